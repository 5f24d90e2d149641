// Recording and replaying, with an interface in C for Python's ctypes.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "launches.h"

namespace memdense::device {

struct Pointer {
  size_t offset;  // in the argument
  size_t index;   // of the address
};

struct Launch {
  Kernel kernel;
  Grid grid;
  std::vector<std::byte> argument;
  std::vector<Pointer> pointers;  // those that are not null
};

struct Scratch {
  uint64_t address, bytes;
};

struct Recording {
  std::vector<Launch> launches;
  std::vector<uint64_t> addresses;  // each once
  std::vector<Scratch> scratch;

  size_t index_of(uint64_t address) {
    const auto found = std::find(addresses.begin(), addresses.end(), address);
    const size_t index = found - addresses.begin();
    if (found == addresses.end()) addresses.push_back(address);
    return index;
  }
};

namespace {

struct Nothing {};

MEMDENSE_KERNEL(32, 1) do_nothing(const Nothing) {}

thread_local std::unique_ptr<Recording> recording;

// Several threads may replay a recording at the same time.
void replay(const Recording& recording, Stream stream, const uint64_t* addresses) {
  for (const Launch& launch : recording.launches) {
    alignas(std::max_align_t) std::byte argument[kMostArgument];
    std::memcpy(argument, launch.argument.data(), launch.argument.size());
    for (const auto& [offset, index] : launch.pointers) {
      std::memcpy(argument + offset, &addresses[index], sizeof(uint64_t));
    }
    start(launch.kernel, launch.grid, argument, stream);
  }
}

}  // namespace

void launch(const Kernel& kernel, const Grid& grid, Stream stream,
            std::span<const std::byte> argument, std::span<const size_t> pointers) {
  prepare(kernel, grid.shared);
  start(kernel, grid, argument.data(), stream);
  if (!recording) return;
  Launch launch{kernel, grid, {argument.begin(), argument.end()}, {}};
  for (const size_t offset : pointers) {
    uint64_t address;
    std::memcpy(&address, &argument[offset], sizeof(address));
    if (address) launch.pointers.push_back({offset, recording->index_of(address)});
  }
  recording->launches.push_back(std::move(launch));
}

void record_scratch(const void* data, int64_t bytes) {
  if (!recording) return;
  recording->scratch.push_back({reinterpret_cast<uint64_t>(data), static_cast<uint64_t>(bytes)});
}

}  // namespace memdense::device

// ---- what Python calls

using memdense::device::Recording;
using memdense::device::Scratch;

extern "C" {
#pragma GCC visibility push(default)

// Why the current device cannot run the kernels, or null.
const char* memdense_unfit() {
  using namespace memdense::device;
  return refusal(erased(do_nothing));
}

// Record what this thread launches, until memdense_recorded().
void memdense_record() { memdense::device::recording = std::make_unique<Recording>(); }

// The recording, for memdense_forget(); null if nothing was launched.
Recording* memdense_recorded() {
  auto done = std::move(memdense::device::recording);
  return done->launches.empty() ? nullptr : done.release();
}

void memdense_forget(Recording* recording) { delete recording; }

// How many addresses there are; written where `to` is not null.
int memdense_addresses(const Recording* recording, uint64_t* to) {
  if (to) std::copy(recording->addresses.begin(), recording->addresses.end(), to);
  return static_cast<int>(recording->addresses.size());
}

// Likewise, of each piece of scratch its address and bytes.
int memdense_scratch(const Recording* recording, uint64_t* to) {
  if (to) std::memcpy(to, recording->scratch.data(), recording->scratch.size() * sizeof(Scratch));
  return static_cast<int>(recording->scratch.size());
}

// Launch on the current device: on a stream, with an address for each that was recorded. Returns
// what went wrong, or null.
const char* memdense_launch(const Recording* recording, const uint64_t* stream_and_addresses) {
  thread_local std::string error;
  try {
    memdense::device::replay(*recording,
                             reinterpret_cast<memdense::device::Stream>(*stream_and_addresses),
                             stream_and_addresses + 1);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

#pragma GCC visibility pop
}
