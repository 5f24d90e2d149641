// Mean and biased variance of every column of x [M, C]: unit column stride, any row stride.
//
// A tile of 64 x 64 values is read twice while it is in L1, the second time about its own mean,
// so nothing cancels. Tiles are merged into chunks and chunks into the result in double and in a
// fixed order that does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "memory.h"
#include "moments.h"
#include "vector.h"

namespace memdense {
namespace {

constexpr int64_t kTileRows = 64;
constexpr int64_t kMaxChunks = 64;  // units of work: bounds the scratch, whatever M is
constexpr int64_t kGrain = 32768;   // values that are worth a thread

// A matrix, and where to copy it on the way (or nowhere: null).
template <typename T>
struct Source {
  const T* x;
  int64_t rows, columns, row_stride;
  T* copy;
  int64_t copy_stride;
};

// Merges a tile into mean[c] and m2[c] of the `count` rows before it; copies it.
template <typename T, typename Acc>
struct TakeTile {
  template <int>
  static MEMDENSE_INLINE void run(const T* x, Rows tile, T* copy, int64_t copy_stride,
                                  int64_t count, double* mean, double* m2) {
    merge_tile<T, Acc>(x, tile, count, mean, m2);
    if (!copy) return;
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::memcpy(copy + r * copy_stride, x + r * tile.row_stride, tile.columns * sizeof(T));
    }
  }
};

// The same of rows, in tiles.
template <typename T, typename Acc>
void take_rows(const T* x, Rows g, T* copy, int64_t copy_stride, int64_t count, double* mean,
               double* m2) {
  for (int64_t row = 0; row < g.rows; row += kTileRows) {
    for (int64_t column = 0; column < g.columns; column += kTileColumns) {
      const Rows tile{std::min(kTileRows, g.rows - row), std::min(kTileColumns, g.columns - column),
                      g.row_stride};
      dispatch<TakeTile<T, Acc>>(x + row * g.row_stride + column, tile,
                                 copy ? copy + row * copy_stride + column : nullptr, copy_stride,
                                 count + row, mean + column, m2 + column);
    }
  }
}

template <typename T, typename Result>
void channel_statistics_kernel(const Source<T>& g, Result* mean, Result* var) {
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
      take_rows<T, Result>(g.x + first * g.row_stride, {last - first, g.columns, g.row_stride},
                           g.copy ? g.copy + first * g.copy_stride : nullptr, g.copy_stride, 0,
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

template <typename T, typename Result>
void run(const Tensor& x, Tensor* copy, Tensor& mean, Tensor& var) {
  const Source<T> source{static_cast<const T*>(x.data_ptr()),
                         x.size(0),
                         x.size(1),
                         x.stride(0),
                         copy ? static_cast<T*>(copy->data_ptr()) : nullptr,
                         copy ? copy->stride(0) : 0};
  channel_statistics_kernel(source, mean.mutable_data_ptr<Result>(),
                            var.mutable_data_ptr<Result>());
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x, Tensor* copy) {
  STD_TORCH_CHECK(x.dim() == 2, "channel_statistics: expected x of shape [M, C], got ", x.dim(),
                  " dimension(s)");
  STD_TORCH_CHECK(x.size(0) > 0, "channel_statistics: expected at least one row, got shape [0, ",
                  x.size(1), "]");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1,
                  "channel_statistics: expected unit column stride, got strides [", x.stride(0),
                  ", ", x.stride(1), "]");

  const ScalarType dtype = x.scalar_type();
  const ScalarType result = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = empty(result, {x.size(1)});
  Tensor var = empty(result, {x.size(1)});
  if (x.size(1) == 0) return {mean, var};
  switch (dtype) {
    case ScalarType::Float:
      run<float, float>(x, copy, mean, var);
      break;
    case ScalarType::Double:
      run<double, double>(x, copy, mean, var);
      break;
    case ScalarType::BFloat16:
      run<BFloat16, float>(x, copy, mean, var);
      break;
    default:
      STD_TORCH_CHECK(false, "channel_statistics: expected float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x) { return statistics(x, nullptr); }

std::tuple<Tensor, Tensor> pack(const Tensor& x, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && out.size(0) == x.size(0) &&
                      out.size(1) == x.size(1) && out.scalar_type() == x.scalar_type() &&
                      (out.size(1) <= 1 || out.stride(1) == 1),
                  "pack: expected out of x's shape and dtype with unit column stride, got ",
                  described(out), " for x ", described(x));
  expect_apart("out", out);
  return statistics(x, &out);
}

}  // namespace
template <typename T>
void merge_rows(const T* x, Rows rows, int64_t count, double* mean, double* m2) {
  take_rows<T, T>(x, rows, nullptr, 0, count, mean, m2);
}

template void merge_rows<float>(const float*, Rows, int64_t, double*, double*);
template void merge_rows<double>(const double*, Rows, int64_t, double*, double*);

}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&memdense::channel_statistics));
  m.impl("pack", TORCH_BOX(&memdense::pack));
}
