// The settings and counters of the emulated machine, for ctypes.
#include "conv3x3_plan.h"

namespace conv3x3 = memdense::conv3x3;
using memdense::device::machine;

extern "C" {

__attribute__((visibility("default"))) void configure(int multiprocessors, int shared_per_block,
                                                      int order) {
  machine().properties = {multiprocessors, shared_per_block, shared_per_block + 1024};
  machine().order = order;
}

// The blocks and teams of a convolution, its tiles and the bytes of shared memory that it asks for.
__attribute__((visibility("default"))) void planned(int images, int side, int dilation,
                                                    int channels, int columns, int value_bytes,
                                                    int mode, int64_t* to) {
  const auto axis = conv3x3::axis(side, side, 1, 1, dilation, -dilation);
  const auto plan =
      conv3x3::plan_convolution(images, axis, axis, channels, columns, value_bytes, true,
                                static_cast<conv3x3::Mode>(mode), machine().properties);
  to[0] = plan.grid.x;
  to[1] = plan.teams;
  to[2] = plan.walk.tiles;
  to[3] = plan.grid.shared;
}

// The same of the weight's gradient: splits, and a block's chunks of channels for teams.
__attribute__((visibility("default"))) void planned_weight(int images, int side, int dilation,
                                                           int channels, int columns,
                                                           int value_bytes, int64_t* to) {
  const auto axis = conv3x3::axis(side, side, 1, 1, dilation, -dilation);
  const auto plan = conv3x3::plan_weight_gradient(images, axis, axis, channels, columns,
                                                  value_bytes, machine().properties);
  to[0] = plan.grid.x;
  to[1] = plan.chunks;
  to[2] = plan.walk.tiles;
  to[3] = plan.grid.shared;
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
