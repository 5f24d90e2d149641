#include "tile.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace memdense {
namespace {

// Products that a sum takes in before it is added to the result, of all there are: short chains
// round less, and a quarter costs little.
constexpr int64_t chain(int64_t products) {
  return products < 4 * 48 ? 48 : products > 4 * 256 ? 256 : products / 4;
}

// 12 sums, 2 columns and a broadcast value are in 16 registers
namespace baseline {
constexpr int kVectorBytes = 16, kMaxVectors = 2, kMaxRows[] = {0, 6, 6, 0};
#include "tile.inc"
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEMDENSE_X86_TILES

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
constexpr int kVectorBytes = 32, kMaxVectors = 2, kMaxRows[] = {0, 6, 6, 0};
#include "tile.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
// 28 sums, 2 columns and a broadcast value are in 32 registers; so are 27, 3 and one
namespace avx512 {
constexpr int kVectorBytes = 64, kMaxVectors = 3, kMaxRows[] = {0, 14, 14, 9};
#include "tile.inc"
}  // namespace avx512
#pragma GCC pop_options
#endif

enum class Isa { baseline, avx2, avx512 };

Isa best() {
#ifdef MEMDENSE_X86_TILES
  const char* asked = std::getenv("MEMDENSE_ISA");
  const bool any = !asked || !std::strcmp(asked, "avx512");
  if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if ((any || !std::strcmp(asked, "avx2")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

}  // namespace

template <typename T>
const TileKernels<T>& tile_kernels() {
  static const Isa isa = best();
#ifdef MEMDENSE_X86_TILES
  if (isa == Isa::avx512) return avx512::kernels<T>;
  if (isa == Isa::avx2) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

}  // namespace memdense
