#include "tile.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "amx.h"
#include "vector.h"

namespace memdense {
namespace {

// Products that a sum takes in before it is added to the result, of all there are: short chains
// round less, and a few cost little.
constexpr int64_t chain(int64_t products) {
  const int64_t longest = std::clamp<int64_t>(products / 4, 64, 256);
  const int64_t chains = (products + longest - 1) / longest;
  return chains < 2 ? products : (products + chains - 1) / chains;
}

// Rows of b that are fetched before their turn: many weights come from beyond L2.
constexpr int64_t kAhead = 16;

// 12 sums, 2 columns and a broadcast value are in 16 registers
namespace baseline {
constexpr int kVectorBytes = 16, kMaxVectors = 2, kMaxRows[] = {0, 6, 6, 0};
#include "tile.inc"
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEMDENSE_X86_TILES

// as MEMDENSE_AVX2 and MEMDENSE_AVX512, which pragmas do not take
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace avx2 {
constexpr int kVectorBytes = 32, kMaxVectors = 2, kMaxRows[] = {0, 6, 6, 0};
#include "tile.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
// 28 sums, 2 columns and a broadcast value are in 32 registers; so are 27, 3 and one
namespace avx512 {
constexpr int kVectorBytes = 64, kMaxVectors = 3, kMaxRows[] = {0, 14, 14, 9};
#include "tile.inc"
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

template <typename T>
const TileKernels<T>& tile_kernels() {
#ifdef MEMDENSE_X86_TILES
  if (register_bytes() == 64) return avx512::kernels<T>;
  if (register_bytes() == 32) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

namespace {

int64_t widest() { return amx::available() ? 1024 : register_bytes(); }

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CompositeExplicitAutograd, m) {
  m.impl("register_bytes", TORCH_BOX(&memdense::widest));
}
