// The settings and counters of the emulated machine, for ctypes.
#include "device.h"

using memdense::device::machine;

extern "C" {

__attribute__((visibility("default"))) void configure(int multiprocessors, int shared_per_block,
                                                      int order) {
  machine().properties = {multiprocessors, shared_per_block, shared_per_block + 1024};
  machine().order = order;
}

// Since the last call: launches, 8x8 matrices read, the cycles that took, and threads that came to
// a barrier of a part of their block.
__attribute__((visibility("default"))) void counters(int64_t* to) {
  to[0] = machine().launches;
  to[1] = machine().matrix_reads;
  to[2] = machine().bank_cycles;
  to[3] = machine().partial_barriers;
  machine().launches = machine().matrix_reads = machine().bank_cycles = 0;
  machine().partial_barriers = 0;
}
}
