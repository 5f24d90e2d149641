// Products of bfloat16 matrices on AMX's tiles, which sum them in float. Numbers below 2^-126 count
// as 0 there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tile.h"
#include "vector.h"

namespace memdense {
namespace amx {

constexpr int64_t kSide = 16;              // rows and columns of a tile of sums
constexpr int64_t kDepth = 32;             // products that an instruction adds to each of them
constexpr int64_t kTile = kSide * kDepth;  // values in a tile of a or b
constexpr int64_t kSquare = 2 * kSide;     // rows and columns of a product

// Has the processor got them, and is ATEN_CPU_CAPABILITY, which may ask for less, not set?
bool available();

// What tiles multiply: a bfloat16, of which those below 2^-126 need not be kept.
struct Value : BFloat16 {};

template <typename Vec>
MEMDENSE_INLINE void store(Value* p, const Vec& v) {
#if MEMDENSE_X86 && !defined(__clang__)
  if constexpr (sizeof(Vec) == 64) {
    typename Bits<Vec>::Short rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    return memdense::store(&p->bits, rounded);
  }
#endif
  memdense::store(static_cast<BFloat16*>(p), v);
}

// This thread's tiles, while it lives: those of a and of sums have `rows` rows.
struct Configuration {
  explicit Configuration(int64_t rows = kSide);
  ~Configuration();
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

using Segment = memdense::Segment<BFloat16>;

// out (+)= sum over steps and segments of a @ b, for one or two tiles of rows by one or two of
// columns. A tile of a has rows of 32 values, a_row apart. A tile of b is dense: 16 rows of 16
// pairs, b[2k][j] beside b[2k + 1][j]. Strides are in values.
struct Product {
  const Segment* segments;
  int64_t count, steps;
  int64_t a_row, a_tile, a_step;  // to the next row, tile of rows and 32 columns
  int64_t b_tile, b_step;         // to the next 16 columns and 32 rows
  float* out;
  int64_t out_row, out_tile;
  bool accumulate;  // of tiles of 16 rows
};

void multiply(int64_t row_tiles, int64_t column_tiles, const Product& product);

// How many tiles a product takes of rows, or columns, first..last.
inline int64_t tile_count(int64_t first, int64_t last) { return last - first > kSide ? 2 : 1; }

// A kernel's run<64>: where there are tiles, there are registers of 64 bytes.
template <typename Kernel, typename... Args>
void run(const Args&... args) {
#if MEMDENSE_X86
  run_avx512<Kernel, Args...>(args...);
#endif
}

// Tiles of b from a matrix `from` [rows, columns], those of 16 columns one behind the other, b_tile
// apart. Rows up to `padded`, an even number, and columns up to a multiple of 16 are 0.
template <int kBytes>
MEMDENSE_INLINE void pair_rows(const BFloat16* from, int64_t from_row, int64_t rows, int64_t padded,
                               int64_t columns, BFloat16* out, int64_t b_tile) {
  using Vec = typename Simd<float, kBytes>::Vec;
  using Long = typename Bits<Vec>::Long;
  static_assert(Bits<Vec>::kLanes == kSide);
  for (int64_t j = 0; j < columns; j += kSide, out += b_tile) {
    const int64_t width = std::min(kSide, columns - j);
    BFloat16* to = out;
    for (int64_t k = 0; k < padded; k += 2, to += kDepth) {
      Long pair[2] = {};
      for (int64_t i = 0; i < 2 && k + i < rows; ++i) {
        const BFloat16* p = from + (k + i) * from_row + j;
        BFloat16 edge[kSide] = {};
        if (width < kSide) p = static_cast<BFloat16*>(std::memcpy(edge, p, width * sizeof(*p)));
        pair[i] = widen<Vec>(p);
      }
      memdense::store(&to->bits, pair[0] | pair[1] << 16);
    }
  }
}

// A tile's pairs, transposed: of b it becomes one of a's, dense, and the other way round.
template <int kBytes>
MEMDENSE_INLINE void transpose_pairs(BFloat16* tile) {
  using Vec = typename Simd<float, kBytes>::Vec;
  Vec square[kSide];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; ++i) square[i] = load<Vec>(&tile[i * kDepth].bits);
  transpose<float, kBytes>(square);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; ++i) memdense::store(&tile[i * kDepth].bits, square[i]);
}

// Tiles of b from its transpose `from` [columns, rows]; rows up to the next multiple of 32 are 0.
template <int kBytes>
MEMDENSE_INLINE void pair_columns(const BFloat16* from, int64_t from_row, int64_t rows,
                                  int64_t columns, BFloat16* out, int64_t b_tile) {
  for (int64_t j = 0; j < columns; j += kSide, out += b_tile) {
    BFloat16* to = out;
    for (int64_t k = 0; k < rows; k += kDepth, to += kTile) {
      const int64_t width = std::min(kSide, columns - j), depth = std::min(kDepth, rows - k);
      if (width < kSide || depth < kDepth) std::fill_n(to, kTile, BFloat16{});
      for (int64_t i = 0; i < width; ++i) {
        std::copy_n(from + (j + i) * from_row + k, depth, to + i * kDepth);
      }
      transpose_pairs<kBytes>(to);
    }
  }
}

}  // namespace amx
}  // namespace memdense
