// Launches, which a thread may record and make again on other memory.
//
// A recording keeps every launch with a copy of its argument, and the addresses that these hold. To
// replay it takes an address for each and launches: no tensor, no plan, no allocation. What was
// decided by a tensor's size, strides or alignment stays decided, so it must hold of the new
// memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "device.h"

namespace memdense::device {

// Bytes of a kernel's argument.
constexpr size_t kMostArgument = 1024;

// On the current device; `pointers` are offsets of all pointers in the argument.
void launch(const Kernel& kernel, const Grid& grid, Stream stream,
            std::span<const std::byte> argument, std::span<const size_t> pointers);

// A kernel's argument is a struct that says with pointers() where its pointers are. One that is
// left out would be replayed as it was.
template <typename Argument>
void launch(void (*kernel)(Argument), const Grid& grid, Stream stream, const Argument& argument) {
  static_assert(std::is_trivially_copyable_v<Argument> && sizeof(Argument) <= kMostArgument);
  static constexpr auto kPointers = Argument::pointers();
  launch(erased(kernel), grid, stream, std::as_bytes(std::span(&argument, 1)), kPointers);
}

// Tells the recording, if there is one, of memory that only its launches use.
void record_scratch(const void* data, int64_t bytes);

}  // namespace memdense::device
