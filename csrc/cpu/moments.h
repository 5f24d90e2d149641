// Mean and m2 = sum (x - mean)^2 of columns, tile by tile: a tile is read twice while it is in
// cache, the second time about its own mean, so nothing cancels; tiles are merged in double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "statistics.h"
#include "vector.h"

namespace memdense {

constexpr int64_t kTileColumns = 64;

// sum[c] = sum (x - pivot[c]) and squares[c] = sum (x - pivot[c])^2 over the tile's rows.
// Four rows at a time: the accumulators are loaded and stored a quarter as often.
template <bool kSquares, typename T, typename Acc>
MEMDENSE_INLINE void accumulate(const T* x, Rows tile, const Acc* __restrict__ pivot,
                                Acc* __restrict__ sum, Acc* __restrict__ squares) {
  std::fill_n(sum, tile.columns, Acc{0});
  if (kSquares) std::fill_n(squares, tile.columns, Acc{0});
  const int64_t stride = tile.row_stride;
  int64_t r = 0;
  for (; r + 4 <= tile.rows; r += 4, x += 4 * stride) {
    for (int64_t c = 0; c < tile.columns; ++c) {
      const Acc d0 = load(x[c]) - pivot[c];
      const Acc d1 = load(x[c + stride]) - pivot[c];
      const Acc d2 = load(x[c + 2 * stride]) - pivot[c];
      const Acc d3 = load(x[c + 3 * stride]) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      if (kSquares) squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < tile.rows; ++r, x += stride) {
    for (int64_t c = 0; c < tile.columns; ++c) {
      const Acc d = load(x[c]) - pivot[c];
      sum[c] += d;
      if (kSquares) squares[c] += d * d;
    }
  }
}

// Merges a tile into mean[c] and m2[c] of the `count` rows before it.
template <typename T, typename Acc>
MEMDENSE_INLINE void merge_tile(const T* x, Rows tile, int64_t count, double* mean, double* m2) {
  Acc pivot[kTileColumns], sum[kTileColumns], squares[kTileColumns];
  for (int64_t c = 0; c < tile.columns; ++c) pivot[c] = load(x[c]);
  accumulate<false>(x, tile, pivot, sum, squares);
  const double n = static_cast<double>(tile.rows);
  for (int64_t c = 0; c < tile.columns; ++c) pivot[c] += sum[c] / static_cast<Acc>(n);
  accumulate<true>(x, tile, pivot, sum, squares);
  for (int64_t c = 0; c < tile.columns; ++c) {
    // pivot is the mean up to rounding; what is left of it is in sum
    const double rest = sum[c] / n;
    merge(static_cast<double>(count), mean[c], m2[c], n, pivot[c] + rest,
          squares[c] - rest * sum[c]);
  }
}

}  // namespace memdense
