// What csrc/cuda/device.h says of a GPU, on the CPU: the kernels run as plain C++, one block at a
// time, its threads as fibers. Nothing here says how fast anything is.
//
// Whatever depends on luck on a GPU is made to fail here: shared memory starts as NaN, asynchronous
// copies land when they are waited for and not before, and the order of threads between two
// barriers can be reversed or shuffled, each warp running ahead of the next as far as barriers let
// it (the results' bits must not notice). Matrix instructions
// follow the fragment layouts of the PTX ISA; a warp whose lanes disagree about the next one, a
// barrier that not all threads reach and an address outside shared memory are errors. races.h finds
// what no barrier orders, where the compiler tells of a kernel's accesses.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

#define MEMDENSE_DISPATCH CPU
#define MEMDENSE_DEVICE inline
#define MEMDENSE_BOTH inline
#define MEMDENSE_KERNEL(threads, blocks) void
// A function that tells of its accesses to shared memory by itself.
#define MEMDENSE_UNWATCHED __attribute__((no_sanitize("thread")))

namespace memdense::device {

constexpr int kLanes = 32;

// What a lane brings to an instruction of its warp, and takes away.
struct Exchange {
  int operation = 0;
  uint32_t address = 0;
  int mask = 0;
  double value = 0;
  const uint32_t* a = nullptr;
  uint32_t b[2] = {};
  float* c = nullptr;
  uint32_t* words = nullptr;
};

enum Operation { kSynchronize = 1, kShuffle, kLoad, kLoadTransposed, kHalf, kBFloat16, kTf32 };

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // ---- settings and counters of the tests
  Properties properties{3, 101376, 102400};
  int order = 0;  // of threads: 0 ascending, 1 descending, otherwise a shuffle's seed
  int64_t launches = 0, matrix_reads = 0, bank_cycles = 0, partial_barriers = 0;
  Races races;

  // ---- a launch
  void run(const std::function<void()>& kernel, const Grid& grid) {
    if (grid.threads % kLanes || grid.threads > 1024) {
      throw std::runtime_error("emulation: odd block");
    }
    if (grid.shared > properties.shared_per_block) {
      throw std::runtime_error("emulation: more shared memory than a block may have");
    }
    ++launches;
    kernel_ = &kernel;
    threads_ = grid.threads;
    grid_x_ = grid.x;
    for (block_y_ = 0; block_y_ < grid.y; ++block_y_) {
      for (block_x_ = 0; block_x_ < grid.x; ++block_x_) run_block(grid.shared);
    }
  }

  // ---- from within a fiber
  int thread() const { return current_; }
  int threads() const { return threads_; }
  int block() const { return block_x_; }
  int blocks() const { return grid_x_; }
  int block_row() const { return block_y_; }
  char* shared() { return shared_; }

  uint32_t address(const void* pointer, int64_t bytes) {
    const int64_t offset = static_cast<const char*>(pointer) - shared_;
    if (offset < 0 || offset + bytes > shared_bytes_) fail("an address outside shared memory");
    return static_cast<uint32_t>(offset);
  }

  // Of barrier `number`, which `threads` have to come to.
  void barrier(int number, int threads, bool waits) {
    Barrier& barrier = barriers_[number];
    if (threads % kLanes || threads > threads_) fail("a barrier of an odd number of threads");
    if (barrier.arrived > 0 && barrier.threads != threads) fail("threads disagree about a barrier");
    barrier.threads = threads;
    if (threads < threads_) ++partial_barriers;
    races.arrive(number, barrier.clock, current_);
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      for (const int waiting : barrier.waiting) {
        fibers_[waiting].ready = true;
        races.leave(barrier.clock, waiting);
      }
      if (waits) races.leave(barrier.clock, current_);
      barrier.waiting.clear();
      barrier.clock.clear();
    } else if (waits) {
      barrier.waiting.push_back(current_);
      wait();
    }
  }

  void warp(const Exchange& exchange) {
    const int first = current_ / kLanes * kLanes;
    int& arrived = arrived_[current_ / kLanes];
    exchanges_[current_] = exchange;
    if (++arrived < kLanes) return wait();
    arrived = 0;
    perform(&exchanges_[first]);
    for (int lane = 0; lane < kLanes; ++lane) fibers_[first + lane].ready = true;
  }

  MEMDENSE_UNWATCHED void copy_async(char* to, const void* from, bool valid) {
    if (address(to, 16) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) {
      fail("an unaligned asynchronous copy");
    }
    races.write(current_, to, 16);
    std::memset(to, 0xff, 16);
    fibers_[current_].copies.push_back({to, valid ? from : nullptr});
  }

  MEMDENSE_UNWATCHED void wait_async() {
    for (const auto& [to, from] : fibers_[current_].copies) {
      races.write(current_, to, 16);
      from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
    }
    fibers_[current_].copies.clear();
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    _longjmp(scheduler_, 1);
  }

 private:
  static constexpr size_t kStack = 64 * 1024;

  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf place;
    bool started, ready, done;
    std::vector<std::pair<char*, const void*>> copies;
  };

  struct Barrier {
    int arrived = 0, threads = 0;
    std::vector<int> waiting;
    Races::Clock clock;
  };

  static void enter() {
    Machine& machine = instance();
    (*machine.kernel_)();
    Fiber& fiber = machine.fibers_[machine.current_];
    if (!fiber.copies.empty()) machine.fail("a thread ends with copies under way");
    fiber.done = true;
    ++machine.finished_;
    _longjmp(machine.scheduler_, 1);
  }

  void wait() {
    Fiber& fiber = fibers_[current_];
    fiber.ready = false;
    if (!_setjmp(fiber.place)) _longjmp(scheduler_, 1);
  }

  void resume(int thread) {
    current_ = thread;
    if (_setjmp(scheduler_)) return;
    Fiber& fiber = fibers_[thread];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  // Each lane up to where it waits; whether any could run.
  bool run_lanes(int first, const std::vector<int>& lanes) {
    bool any = false;
    for (const int lane : lanes) {
      const Fiber& fiber = fibers_[first + lane];
      if (!fiber.ready || fiber.done) continue;
      any = true;
      resume(first + lane);
      if (!error_.empty()) throw std::runtime_error("emulation: " + error_);
    }
    return any;
  }

  void run_block(int shared) {
    constexpr int kGuard = 4096;
    shared_bytes_ = shared;
    // aligned as a GPU's
    memory_.assign(shared + kGuard + 128, '\xff');
    char* start = memory_.data();
    shared_ = start + (128 - reinterpret_cast<uintptr_t>(start) % 128) % 128;
    fibers_.resize(threads_);
    exchanges_.resize(threads_);
    arrived_.assign(threads_ / kLanes, 0);
    for (Barrier& barrier : barriers_) barrier = {};
    finished_ = 0;
    error_.clear();
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      fiber.started = fiber.done = false;
      fiber.ready = true;
      fiber.copies.clear();
    }
    races.begin(shared_, shared, threads_);
    std::vector<int> warps(threads_ / kLanes), lanes(kLanes);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    for (auto* turns : {&warps, &lanes}) {
      if (order == 1) std::reverse(turns->begin(), turns->end());
      if (order > 1) std::shuffle(turns->begin(), turns->end(), std::mt19937(order));
    }
    while (finished_ < threads_) {
      bool progress = false;
      // a warp runs as far as it gets before the next one starts
      for (const int warp : warps) {
        while (run_lanes(warp * kLanes, lanes)) progress = true;
      }
      if (!progress) throw std::runtime_error("emulation: threads wait for each other");
    }
    races.end();
    for (int i = 0; i < kGuard; ++i) {
      if (shared_[shared + i] != '\xff') {
        throw std::runtime_error("emulation: a write outside shared memory");
      }
    }
  }

  // One instruction of 32 lanes.
  void perform(Exchange* lanes) {
    const int operation = lanes[0].operation;
    for (int lane = 1; lane < kLanes; ++lane) {
      if (lanes[lane].operation != operation) fail("the lanes of a warp disagree");
    }
    if (operation == kShuffle) {
      double values[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) values[lane] = lanes[lane ^ lanes[lane].mask].value;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane].value = values[lane];
    } else if (operation == kLoad || operation == kLoadTransposed) {
      load(lanes, operation == kLoadTransposed);
    } else if (operation == kTf32) {
      multiply_tf32(lanes);
    } else if (operation == kSynchronize) {
      const int first = static_cast<int>(lanes - exchanges_.data());
      Races::Clock clock;
      for (int i = 0; i < kLanes; ++i) races.arrive(Races::kWarp, clock, first + i);
      for (int i = 0; i < kLanes; ++i) races.leave(clock, first + i);
    } else {
      multiply(lanes, operation);
    }
  }

 public:
  double shuffled() const { return exchanges_[current_].value; }

 private:
  MEMDENSE_UNWATCHED void load(Exchange* lanes, bool transposed) {
    const int first = static_cast<int>(lanes - exchanges_.data());
    for (int matrix = 0; matrix < 4; ++matrix) {
      char rows[8][16];
      std::set<uint32_t> lines[8];  // of each group of four banks
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = lanes[matrix * 8 + row].address;
        if (address % 16 || address + 16 > static_cast<uint32_t>(shared_bytes_)) {
          fail("an address outside shared memory, or an unaligned one, for ldmatrix");
        }
        races.read(first + matrix * 8 + row, shared_ + address, 16);
        std::memcpy(rows[row], shared_ + address, 16);
        lines[address / 16 % 8].insert(address);
      }
      size_t cycles = 1;
      for (const auto& line : lines) cycles = std::max(cycles, line.size());
      ++matrix_reads;
      bank_cycles += static_cast<int64_t>(cycles);
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t word;
        if (transposed) {
          uint16_t values[2];
          for (int i = 0; i < 2; ++i) {
            std::memcpy(&values[i], rows[lane % 4 * 2 + i] + lane / 4 * 2, 2);
          }
          std::memcpy(&word, values, 4);
        } else {
          std::memcpy(&word, rows[lane / 4] + lane % 4 * 4, 4);
        }
        lanes[lane].words[matrix] = word;
      }
    }
  }

  static float value(uint32_t word, int which, int operation) {
    const uint16_t bits = static_cast<uint16_t>(which ? word >> 16 : word);
    if (operation == kHalf) {
      _Float16 half;
      std::memcpy(&half, &bits, 2);
      return static_cast<float>(half);
    }
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
  }

  // m16n8k16
  void multiply(Exchange* lanes, int operation) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) {
          a[g + r % 2 * 8][t * 2 + i + r / 2 * 8] = value(lanes[lane].a[r], i, operation);
        }
        for (int r = 0; r < 2; ++r) b[g][t * 2 + i + r * 8] = value(lanes[lane].b[r], i, operation);
      }
    }
    accumulate<16>(lanes, a, b);
  }

  // m16n8k8
  void multiply_tf32(Exchange* lanes) {
    float a[16][8], b[8][8];
    const auto read = [](uint32_t word) {
      word &= ~uint32_t{0x1fff};
      float result;
      std::memcpy(&result, &word, 4);
      return result;
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = read(lanes[lane].a[r]);
      for (int r = 0; r < 2; ++r) b[g][t + r * 4] = read(lanes[lane].b[r]);
    }
    accumulate<8>(lanes, a, b);
  }

  template <int kDepth>
  static void accumulate(Exchange* lanes, const float (&a)[16][kDepth],
                         const float (&b)[8][kDepth]) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane].c[i];
        // as measured on tensor cores: products are exact, and half of them are added at a time,
        // towards zero (Fasi, Higham, Mikaitis and Pranesh, 2021)
        for (int first = 0; first < kDepth; first += kDepth / 2) {
          double exact = sum;
          for (int k = first; k < first + kDepth / 2; ++k) {
            exact += static_cast<double>(a[row][k]) * b[column][k];
          }
          sum = static_cast<float>(exact);
          if (std::isfinite(sum) && std::abs(sum) > std::abs(exact)) sum = std::nextafter(sum, 0.f);
        }
        lanes[lane].c[i] = sum;
      }
    }
  }

  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0, grid_x_ = 0, block_x_ = 0, block_y_ = 0, current_ = 0;
  int finished_ = 0;
  Barrier barriers_[16];
  int64_t shared_bytes_ = 0;
  std::vector<char> memory_;
  char* shared_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  std::vector<int> arrived_;
  jmp_buf scheduler_;
  std::string error_;
};

inline Machine& machine() { return Machine::instance(); }

inline int thread() { return machine().thread(); }
inline int threads() { return machine().threads(); }
inline int block() { return machine().block(); }
inline int blocks() { return machine().blocks(); }
inline int block_row() { return machine().block_row(); }
inline int opaque(int x) { return x; }

inline void synchronize_block() { machine().barrier(0, machine().threads(), true); }
template <int kBarrier>
inline void synchronize_threads(int threads) {
  machine().barrier(kBarrier, threads, true);
}
template <int kBarrier>
inline void arrive_threads(int threads) {
  machine().barrier(kBarrier, threads, false);
}

inline void synchronize_warp() { machine().warp({.operation = kSynchronize}); }

inline double exchange(double value, int mask) {
  machine().warp({.operation = kShuffle, .mask = mask, .value = value});
  return machine().shuffled();
}
inline float exchange(float value, int mask) {
  return static_cast<float>(exchange(static_cast<double>(value), mask));
}

constexpr int kSectorBytes = 32;
inline void prefetch(const void*) {}

inline char* shared_memory() { return machine().shared(); }
inline uint32_t shared_address(const void* pointer) { return machine().address(pointer, 0); }
inline void copy_async(char* to, const void* from, bool valid) {
  machine().copy_async(to, from, valid);
}
inline void wait_async() { machine().wait_async(); }

inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  machine().warp({.operation = kLoad, .address = address, .words = to});
}
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  machine().warp({.operation = kLoadTransposed, .address = address, .words = to});
}

inline void multiply_add(int operation, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1) {
  machine().warp({.operation = operation, .a = a, .b = {b0, b1}, .c = c});
}
inline void multiply_add(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add(kHalf, c, a, b0, b1);
}
inline void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1) {
  multiply_add(kBFloat16, c, a, b0, b1);
}
inline void multiply_add(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add(kTf32, c, a, b0, b1);
}

inline float to_float(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(float x) { return x; }

inline Half round_to(Half, float x) {
  const _Float16 value = static_cast<_Float16>(x);
  Half result;
  std::memcpy(&result.bits, &value, 2);
  return result;
}
inline BFloat16 round_to(BFloat16, float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float round_to(float, float x) { return x; }

template <typename V>
inline void unpack(V, uint32_t word, float* to) {
  to[0] = to_float(V{static_cast<uint16_t>(word)});
  to[1] = to_float(V{static_cast<uint16_t>(word >> 16)});
}
inline void unpack(float, uint32_t word, float* to) { std::memcpy(to, &word, 4); }

inline float relu(float x) { return x <= 0.f ? 0.f : x; }
template <typename V>
inline uint32_t pack(V, const float* x) {
  const uint32_t first = round_to(V{}, x[0]).bits, second = round_to(V{}, x[1]).bits;
  return first | second << 16;
}
inline uint32_t pack(float, const float* x) {
  uint32_t word;
  std::memcpy(&word, x, 4);
  return word;
}
template <typename V>
inline uint32_t relu_word(V, const float* x) {
  const float y[2] = {relu(x[0]), sizeof(V) == 2 ? relu(x[1]) : 0.f};
  return pack(V{}, y);
}

// To nearest, ties away from zero.
inline uint32_t round_tf32(uint32_t bits) {
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
}

inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float quotient(float a, float b) { return a / b; }

// ---- the host's side

using Stream = void*;

inline Properties properties(int) { return machine().properties; }

using Kernel = std::function<void(const void*)>;

template <typename Argument>
Kernel erased(void (*kernel)(Argument)) {
  return [=](const void* argument) { kernel(*static_cast<const Argument*>(argument)); };
}

inline const char* refusal(const Kernel&) { return nullptr; }

inline void prepare(const Kernel&, int) {}

inline void start(const Kernel& kernel, const Grid& grid, const void* argument, Stream) {
  machine().run([&] { kernel(argument); }, grid);
}

}  // namespace memdense::device
