// Mean and biased variance of every column of x [M, C]: unit column stride, any row stride.
//
// A tile of 64 x 64 values is read twice while it is in L1, the second time about its own mean,
// so nothing cancels. Tiles are merged into chunks and chunks into the result in double and in a
// fixed order that does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "statistics.h"

namespace memdense {
namespace {

constexpr int64_t kTileRows = 64;
constexpr int64_t kTileColumns = 64;
constexpr int64_t kMaxChunks = 64;  // units of work: bounds the scratch, whatever M is
constexpr int64_t kGrain = 32768;   // values that are worth a thread

using Geometry = Rows;

// sum[c] = sum (x - pivot[c]) and squares[c] = sum (x - pivot[c])^2 over the tile's rows.
// Four rows at a time: the accumulators are loaded and stored a quarter as often.
template <bool kSquares, typename T, typename Acc>
inline void accumulate(const T* x, Geometry tile, const Acc* __restrict__ pivot,
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
MEMDENSE_SIMD void merge_tile(const T* x, Geometry tile, int64_t count, double* mean, double* m2) {
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

}  // namespace

template <typename T, typename Acc>
void merge_rows(const T* x, Rows g, int64_t count, double* mean, double* m2) {
  for (int64_t row = 0; row < g.rows; row += kTileRows) {
    for (int64_t column = 0; column < g.columns; column += kTileColumns) {
      const Geometry tile{std::min(kTileRows, g.rows - row),
                          std::min(kTileColumns, g.columns - column), g.row_stride};
      merge_tile<T, Acc>(x + row * g.row_stride + column, tile, count + row, mean + column,
                         m2 + column);
    }
  }
}

template void merge_rows<float, float>(const float*, Rows, int64_t, double*, double*);
template void merge_rows<double, double>(const double*, Rows, int64_t, double*, double*);
template void merge_rows<BFloat16, float>(const BFloat16*, Rows, int64_t, double*, double*);

namespace {

template <typename T, typename Result>
void channel_statistics_kernel(const T* x, Geometry g, Result* mean, Result* var) {
  const int64_t tiles = (g.rows + kTileRows - 1) / kTileRows;
  const int64_t chunks = std::min(tiles, kMaxChunks);
  const auto first_row = [&](int64_t chunk) {
    return std::min(chunk * tiles / chunks * kTileRows, g.rows);
  };

  std::vector<double> scratch(2 * chunks * g.columns);  // [chunk][mean, m2][column]
  const int64_t grain = 1 + kGrain * chunks / (g.rows * g.columns + 1);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* chunk_mean = &scratch[2 * chunk * g.columns];
      double* chunk_m2 = chunk_mean + g.columns;
      const int64_t first = first_row(chunk), last = first_row(chunk + 1);
      merge_rows<T, Result>(x + first * g.row_stride, {last - first, g.columns, g.row_stride}, 0,
                            chunk_mean, chunk_m2);
    }
  });

  for (int64_t column = 0; column < g.columns; ++column) {
    double total_mean = 0, total_m2 = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* values = &scratch[2 * chunk * g.columns + column];
      const int64_t first = first_row(chunk);
      merge(static_cast<double>(first), total_mean, total_m2,
            static_cast<double>(first_row(chunk + 1) - first), values[0], values[g.columns]);
    }
    mean[column] = static_cast<Result>(total_mean);
    var[column] = static_cast<Result>(total_m2 / static_cast<double>(g.rows));
  }
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "channel_statistics: expected x of shape [M, C], got ", x.dim(),
                  " dimension(s)");
  const Geometry g{x.size(0), x.size(1), x.stride(0)};
  STD_TORCH_CHECK(g.rows > 0, "channel_statistics: expected at least one row, got shape [0, ",
                  g.columns, "]");
  STD_TORCH_CHECK(g.columns <= 1 || x.stride(1) == 1,
                  "channel_statistics: expected unit column stride, got strides [", x.stride(0),
                  ", ", x.stride(1), "]");

  const ScalarType dtype = x.scalar_type();
  const ScalarType result = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = torch::stable::empty({g.columns}, result);
  Tensor var = torch::stable::empty({g.columns}, result);
  if (g.columns == 0) return {mean, var};
  switch (dtype) {
    case ScalarType::Float:
      channel_statistics_kernel(x.const_data_ptr<float>(), g, mean.mutable_data_ptr<float>(),
                                var.mutable_data_ptr<float>());
      break;
    case ScalarType::Double:
      channel_statistics_kernel(x.const_data_ptr<double>(), g, mean.mutable_data_ptr<double>(),
                                var.mutable_data_ptr<double>());
      break;
    case ScalarType::BFloat16:
      channel_statistics_kernel(static_cast<const BFloat16*>(x.const_data_ptr()), g,
                                mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
      break;
    default:
      STD_TORCH_CHECK(false, "channel_statistics: expected float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
  return {mean, var};
}

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&memdense::channel_statistics));
}
