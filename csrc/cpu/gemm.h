// The matrix product that all 1x1 convolutions are made of: c (+)= a @ b for tiles in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace memdense {

// A micro-kernel keeps 6 rows by a panel of c in registers: for each k it loads the panel's
// vectors of b once and broadcasts six values of a.
constexpr int64_t kMicroRows = 6;
// How many k a micro-kernel sums before c takes them: 256 by a panel of b stay in L2.
constexpr int64_t kDepth = 256;

// c[i][j] (+)= sum_k a[i * a_row + k * a_depth] * b[k * kPanel + j] for 6 rows, kVectors vectors.
template <typename T, int kBytes, int kVectors>
MEMDENSE_INLINE void micro_product(const T* a, int64_t a_row, int64_t a_depth, const T* b,
                                   int64_t depth, T* c, int64_t c_row, bool accumulate) {
  using S = Simd<T, kBytes>;
  using Vec = typename S::Vec;
  Vec sum[kMicroRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kMicroRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += S::kPanel) {
    Vec row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load<Vec>(b + v * S::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kMicroRows; ++i) {
      const T value = a[i * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMicroRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* target = c + i * c_row + v * S::kLanes;
      store(target, accumulate ? load<Vec>(target) + sum[i][v] : sum[i][v]);
    }
  }
}

// As many rows, and columns up to a panel. Rows of a are read up to the next multiple of 6 and
// columns of b up to the next whole vector; of c only rows x columns is touched.
template <typename T, int kBytes, int kVectors>
MEMDENSE_INLINE void panel_rows(const T* a, int64_t a_row, int64_t a_depth, const T* b,
                                int64_t depth, T* c, int64_t c_row, int64_t rows, int64_t columns,
                                bool accumulate) {
  constexpr int64_t width = kVectors * Simd<T, kBytes>::kLanes;
  for (int64_t i = 0; i < rows; i += kMicroRows, a += kMicroRows * a_row, c += kMicroRows * c_row) {
    const int64_t count = std::min(kMicroRows, rows - i);
    if (count == kMicroRows && columns == width) {
      micro_product<T, kBytes, kVectors>(a, a_row, a_depth, b, depth, c, c_row, accumulate);
      continue;
    }
    T edge[kMicroRows * width];
    micro_product<T, kBytes, kVectors>(a, a_row, a_depth, b, depth, edge, width, false);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        const T old = accumulate ? c[r * c_row + j] : T{0};
        c[r * c_row + j] = old + edge[r * width + j];
      }
    }
  }
}

template <typename T, int kBytes>
MEMDENSE_INLINE void panel_product(const T* a, int64_t a_row, int64_t a_depth, const T* b,
                                   int64_t depth, T* c, int64_t c_row, int64_t rows,
                                   int64_t columns, bool accumulate) {
  const int64_t vectors = (columns + Simd<T, kBytes>::kLanes - 1) / Simd<T, kBytes>::kLanes;
#define MEMDENSE_PANEL(count)                                                               \
  return panel_rows<T, kBytes, count>(a, a_row, a_depth, b, depth, c, c_row, rows, columns, \
                                      accumulate)
  if (vectors == 1) MEMDENSE_PANEL(1);
  if (vectors == 2) MEMDENSE_PANEL(2);
  if constexpr (Simd<T, kBytes>::kVectors == 4) {
    if (vectors == 3) MEMDENSE_PANEL(3);
    MEMDENSE_PANEL(4);
  }
#undef MEMDENSE_PANEL
}

// One panel of b from w: out[k][j] = w[k * k_step + j * j_step], zero beyond the columns.
template <typename T, int kBytes>
MEMDENSE_INLINE void pack_panel(const T* w, int64_t k_step, int64_t j_step, int64_t depth,
                                int64_t columns, T* out) {
  constexpr int64_t panel = Simd<T, kBytes>::kPanel;
  if (columns < panel) std::fill_n(out, depth * panel, T{0});
  if (j_step == 1) {
    for (int64_t k = 0; k < depth; ++k) std::copy_n(w + k * k_step, columns, out + k * panel);
    return;
  }
  if (k_step == 1) return transpose<T, kBytes>(w, j_step, depth, columns, out, panel);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = 0; k < depth; ++k) out[k * panel + j] = w[k * k_step + j * j_step];
  }
}

}  // namespace memdense
