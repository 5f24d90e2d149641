// What a compiler calls at each access of code that it compiles with -fsanitize=thread; and what
// was found, for ctypes.
#include <cstring>

#include "device.h"

using memdense::device::machine;
using memdense::device::Races;

// Not of its own accesses, where the linker chose such inline functions as are compiled so.
static void tell(void (Races::*access)(int, const void*, int), const void* at, size_t bytes) {
  static bool telling = false;
  if (telling) return;
  telling = true;
  (machine().races.*access)(machine().thread(), at, static_cast<int>(bytes));
  telling = false;
}

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_read_range(void* from, size_t bytes) { tell(&Races::read, from, bytes); }
void __tsan_write_range(void* to, size_t bytes) { tell(&Races::write, to, bytes); }

// Some compilers see to these themselves.
void* __tsan_memset(void* to, int value, size_t bytes) {
  __tsan_write_range(to, bytes);
  return std::memset(to, value, bytes);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  return std::memcpy(to, from, bytes);
}

#define ACCESSES(bytes)                                                             \
  void __tsan_read##bytes(void* from) { __tsan_read_range(from, bytes); }           \
  void __tsan_write##bytes(void* to) { __tsan_write_range(to, bytes); }             \
  void __tsan_unaligned_read##bytes(void* from) { __tsan_read_range(from, bytes); } \
  void __tsan_unaligned_write##bytes(void* to) { __tsan_write_range(to, bytes); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// From now on; `ignored` is the number of a barrier that shall not count, -1 a warp's, -2 none.
__attribute__((visibility("default"))) void watch_races(int ignored) {
  auto& races = machine().races;
  races = {};
  races.watching = true;
  races.ignored = ignored;
}

// Since then: accesses and races; what the first of these was.
__attribute__((visibility("default"))) const char* races(int64_t* to) {
  to[0] = machine().races.accesses;
  to[1] = machine().races.found;
  return machine().races.first.c_str();
}
}
