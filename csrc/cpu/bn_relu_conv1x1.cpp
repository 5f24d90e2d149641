// y = relu(scale * x + shift) @ W^T for x [M, C] and W [B, C], and its backward; with 2x2 mean
// pooling before the product too, as a transition has it.
//
// A worker owns a range of rows and takes a tile of them at a time: it reads the tile through
// BatchNorm and ReLU into scratch that stays in its cache and multiplies that. X and G are
// touched once each.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "answer.h"
#include "gemm.h"
#include "moments.h"
#include "tensors.h"
#include "vector.h"
#include "workers.h"

namespace memdense {
namespace {

constexpr int64_t kTileRows = 96;
// A little more than the values of a row: rows a power of two apart would share cache sets.
constexpr int64_t kDepthRow = kDepth + 16;

// Tiles of nearly equal size, each but the last a multiple of the micro-kernel's rows.
int64_t tile_rows(int64_t rows) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  return round_up((rows + tiles - 1) / tiles, kMicroRows);
}

template <typename T>
struct Pack {
  const T* w;
  int64_t k_step, j_step, depth, columns;
  T* packed;  // [panel][depth][kPanel]

  template <int kBytes>
  static MEMDENSE_INLINE void run(const Pack& a, int64_t first, int64_t last) {
    constexpr int64_t panel = Simd<T, kBytes>::kPanel;
    for (int64_t p = first; p < last; ++p) {
      pack_panel<T, kBytes>(a.w + p * panel * a.j_step, a.k_step, a.j_step, a.depth,
                            std::min(panel, a.columns - p * panel), a.packed + p * a.depth * panel);
    }
  }
};

// The right side of a product with `columns` columns, in panels; `packed` keeps it alive.
template <typename T>
const T* pack(const T* w, int64_t k_step, int64_t j_step, int64_t depth, int64_t columns,
              Tensor& packed) {
  const int64_t vectors = register_bytes() == 64 ? 4 : 2;
  const int64_t panel = vectors * register_bytes() / static_cast<int64_t>(sizeof(T));
  const int64_t panels = (columns + panel - 1) / panel;
  packed = make<T>({panels * depth * panel});
  const Pack<T> work{w, k_step, j_step, depth, columns, static_cast<T*>(packed.data_ptr())};
  Workers(panels).run(
      [&](int64_t, int64_t first, int64_t last) { dispatch<Pack<T>>(work, first, last); });
  return work.packed;
}

// ---- forward

template <typename S, int kTaps>
struct Forward {
  using T = Compute<S>;

  const S* x;
  int64_t x_row;
  Pixels<kTaps> pixels;
  Reader<T> read;
  int64_t channels, outputs;
  const T* weight;  // packed W^T
  S* y;             // [rows, outputs]

  static constexpr bool kInPlace = std::is_same_v<S, T>;  // do products sum up in y?

  int64_t scratch() const { return kTileRows * (kDepthRow + (kInPlace ? 0 : outputs)); }

  // Rows first..last of y; with m2 not null also mean and m2 of its columns there.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const Forward& a, int64_t first, int64_t last, T* z, double* mean,
                                  double* m2) {
    constexpr int64_t panel = Simd<T, kBytes>::kPanel;
    const int64_t step = tile_rows(last - first);
    std::fill_n(z, kTileRows * kDepthRow, T{0});
    for (int64_t top = first; top < last; top += step) {
      const int64_t rows = std::min(step, last - top);
      int64_t source[kTileRows];
      for (int64_t r = 0; r < rows; ++r) source[r] = a.pixels.row(top + r);
      S* y = a.y + top * a.outputs;
      T* products;
      if constexpr (kInPlace)
        products = y;
      else
        products = z + kTileRows * kDepthRow;
      for (int64_t k = 0; k < a.channels; k += kDepth) {
        const int64_t depth = std::min(kDepth, a.channels - k);
        read_tile<S, T, kBytes>(a.x, a.x_row, source, a.pixels, a.read, k, depth, rows, z,
                                kDepthRow);
        for (int64_t j = 0; j < a.outputs; j += panel) {
          panel_product<T, kBytes>(z, kDepthRow, 1, a.weight + j * a.channels + k * panel, depth,
                                   products + j, a.outputs, rows, std::min(panel, a.outputs - j),
                                   k > 0);
        }
      }
      if constexpr (!kInPlace) {
        for_columns<T, kBytes, 1>(0, rows * a.outputs,
                                  [&]<typename Vec, int>(int64_t i) MEMDENSE_INLINE_LAMBDA {
                                    store(y + i, load<Vec>(products + i));
                                  });
      }
      if (!m2) continue;
      for (int64_t c = 0; c < a.outputs; c += kTileColumns) {
        const Rows tile{rows, std::min(kTileColumns, a.outputs - c), a.outputs};
        merge_tile<S, T>(y + c, tile, top - first, mean + c, m2 + c);
      }
    }
  }
};

template <int kTaps>
Tensor forward(const Tensor& x, const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, double eps, const Tensor& weight, int64_t rows,
               Pixels<kTaps> pixels, const MaybeTensor& moments) {
  return with_dtype(x, [&]<typename S>(S) {
    using T = Compute<S>;
    const int64_t channels = x.size(1), outputs = rows_of(weight);
    Tensor y = make<S>({rows, outputs}), packed;
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, channels);
    const Tensor exact = as_computed<T>(weight);
    const T* w = matrix<const T>(exact, outputs, channels, "weight");
    const Forward<S, kTaps> work{matrix<const S>(x, x.size(0), channels, "x"),
                                 x.stride(0),
                                 pixels,
                                 vectors.reader(),
                                 channels,
                                 outputs,
                                 pack(w, 1, exact.stride(0), channels, outputs, packed),
                                 static_cast<S*>(y.data_ptr())};

    if (rows == 0) return y;
    const Workers workers((rows + kMicroRows - 1) / kMicroRows);
    Tensor scratch = make<T>({workers.count * work.scratch()});
    const TwoRows<T> statistics(moments, outputs, "moments");
    std::vector<double> parts(moments ? 2 * workers.count * outputs : 0);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      double* worker_mean = moments ? &parts[2 * w * outputs] : nullptr;
      double* worker_m2 = moments ? worker_mean + outputs : nullptr;
      dispatch<Forward<S, kTaps>>(work, first * kMicroRows, std::min(last * kMicroRows, rows),
                                  static_cast<T*>(scratch.data_ptr()) + w * work.scratch(),
                                  worker_mean, worker_m2);
    });
    for (int64_t c = 0; moments && c < outputs; ++c) {
      double total_mean = 0, total_m2 = 0;
      for (int64_t w = 0; w < workers.count; ++w) {
        const double before = static_cast<double>(workers.first(w) * kMicroRows);
        const double end = std::min(static_cast<double>(workers.first(w + 1) * kMicroRows),
                                    static_cast<double>(rows));
        const double* part = &parts[2 * w * outputs + c];
        merge(before, total_mean, total_m2, end - before, part[0], part[outputs]);
      }
      statistics.first[c] = static_cast<T>(total_mean);
      statistics.second[c] = static_cast<T>(total_m2 / static_cast<double>(rows));
    }
    return y;
  });
}

// ---- backward

// dy = a * dz + b * y + c; without b and c they are 0, without a it is 1.
template <typename S>
struct Incoming {
  const S* dz;
  int64_t dz_row;
  const S* y;
  int64_t y_row;
  const Compute<S>*a, *b, *c;
};

// The norm behind the convolution and what its backward left; without a mean there is none.
struct Behind {
  const MaybeTensor &y, &mean, &var, &gamma;
  double eps;
  const MaybeTensor &dbeta, &dgamma;

  template <typename T>
  NormGradient<T> gradient(int64_t outputs, int64_t rows) const {
    STD_TORCH_CHECK(mean ? var && dbeta && dgamma : !(y || var || gamma || dbeta || dgamma),
                    "memdense: expected all of the norm behind, or none");
    if (!mean) return {};
    return norm_gradient<T>(*mean, *var, gamma, eps, *dbeta, *dgamma, outputs, rows, y.has_value());
  }
};

template <typename S, typename G, int kTaps>
struct Backward {
  using T = Compute<S>;

  Incoming<S> incoming;
  const S* x;
  int64_t x_row;
  G* g;
  int64_t g_row;
  bool add;
  Pixels<kTaps> pixels;
  Reader<T> read;
  int64_t channels, outputs;
  const T* weight;  // packed W

  int64_t dy_row() const { return round_up(outputs, 16) + 16; }
  int64_t panel() const { return 256 / static_cast<int64_t>(sizeof(T)); }  // at most
  int64_t scratch() const { return kTileRows * (dy_row() + 2 * panel()); }

  template <int kBytes>
  static MEMDENSE_INLINE void incoming_tile(const Incoming<S>& in, int64_t top, int64_t rows,
                                            int64_t outputs, T* dy, int64_t dy_row) {
    for (int64_t r = 0; r < rows; ++r, dy += dy_row) {
      const S* dz = in.dz + (top + r) * in.dz_row;
      const S* y = in.y + (top + r) * in.y_row;
      for_columns<T, kBytes, 1>(0, outputs,
                                [&]<typename Vec, int>(int64_t j) MEMDENSE_INLINE_LAMBDA {
                                  Vec d = load<Vec>(dz + j);
                                  if (in.a) d *= load<Vec>(in.a + j);
                                  if (in.b) {
                                    d += load<Vec>(y + j) * load<Vec>(in.b + j);
                                    d += load<Vec>(in.c + j);
                                  }
                                  store(dy + j, d);
                                });
    }
  }

  // Rows first..last: da = dy @ W, answered into g and sums [kSums][channels], and with dweight
  // [outputs, channels] not null dweight = dy^T @ z.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const Backward& a, int64_t first, int64_t last, T* dy,
                                  double* sums, T* dweight) {
    constexpr int64_t panel = Simd<T, kBytes>::kPanel;
    const int64_t step = tile_rows(last - first), dy_row = a.dy_row();
    std::fill_n(dy, a.scratch(), T{0});
    T* da = dy + kTileRows * dy_row;
    T* z = da + kTileRows * panel;
    for (int64_t top = first; top < last; top += step) {
      const int64_t rows = std::min(step, last - top);
      int64_t source[kTileRows];
      for (int64_t r = 0; r < rows; ++r) source[r] = a.pixels.row(top + r);
      incoming_tile<kBytes>(a.incoming, top, rows, a.outputs, dy, dy_row);
      for (int64_t j = 0; j < a.channels; j += panel) {
        const int64_t columns = std::min(panel, a.channels - j);
        for (int64_t k = 0; k < a.outputs; k += kDepth) {
          panel_product<T, kBytes>(dy + k, dy_row, 1, a.weight + j * a.outputs + k * panel,
                                   std::min(kDepth, a.outputs - k), da, panel, rows, columns,
                                   k > 0);
        }
        const Answer<S, T, G, kTaps> answer{.rows = rows,
                                            .source = source,
                                            .pixels = a.pixels,
                                            .da = da,
                                            .da_row = panel,
                                            .x = a.x,
                                            .x_row = a.x_row,
                                            .g = a.g,
                                            .g_row = a.g_row,
                                            .add = a.add,
                                            .read = a.read,
                                            .sums = sums,
                                            .channels = a.channels,
                                            .z = dweight ? z : nullptr,
                                            .z_row = panel};
        answer_tile<kBytes, true>(answer, j, columns);
        if (!dweight) continue;
        panel_product<T, kBytes>(dy, 1, dy_row, z, rows, dweight + j, a.channels, a.outputs,
                                 columns, top > first);
      }
    }
  }
};

template <int kTaps>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dz, const Behind& behind,
                                            const Tensor& weight, const Tensor& x,
                                            const Tensor& mean, const Tensor& var,
                                            const MaybeTensor& gamma, const MaybeTensor& beta,
                                            double eps, Tensor g, bool add, const MaybeTensor& sums,
                                            Pixels<kTaps> pixels, int64_t rows, bool need_weight) {
  const auto run = [&]<typename S, typename G>(S, G) {
    using T = Compute<S>;
    const int64_t channels = x.size(1), outputs = rows_of(weight);
    Tensor dbeta = make<T>({channels}), dgamma = make<T>({channels}), packed;
    Tensor dweight = make<T>({need_weight ? outputs : 0, channels});
    T* total = need_weight ? static_cast<T*>(dweight.data_ptr()) : nullptr;
    const Tensor exact = as_computed<T>(weight);
    const T* w = matrix<const T>(exact, outputs, channels, "weight");
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, channels);
    const NormGradient<T> gradient = behind.gradient<T>(outputs, rows);
    const MaybeTensor& y = behind.y;
    const Incoming<S> incoming{matrix<const S>(dz, rows, outputs, "dz"),
                               dz.stride(0),
                               y ? matrix<const S>(*y, rows, outputs, "y") : nullptr,
                               y ? y->stride(0) : 0,
                               data_or_null(gradient.a),
                               data_or_null(gradient.b),
                               data_or_null(gradient.c)};
    Backward<S, G, kTaps> work{.incoming = incoming,
                               .x = matrix<const S>(x, x.size(0), channels, "x"),
                               .x_row = x.stride(0),
                               .g = matrix<G>(g, x.size(0), channels, "g"),
                               .g_row = g.stride(0),
                               .add = add,
                               .pixels = pixels,
                               .read = vectors.reader(),
                               .channels = channels,
                               .outputs = outputs,
                               .weight = pack(w, exact.stride(0), 1, outputs, channels, packed)};

    const TwoRows<T> credited(sums, channels, "sums");
    if (kTaps > 1 && !add && (pixels.h % 2 || pixels.w % 2)) {
      // there are pixels that no window reads
      torch::stable::zero_(g);
      work.add = true;
    }
    if (rows == 0) {
      for (Tensor* t : {&dbeta, &dgamma, &dweight}) torch::stable::zero_(*t);
      return std::make_tuple(dbeta, dgamma, dweight);
    }
    const Workers workers((rows + kMicroRows - 1) / kMicroRows);
    Tensor scratch = make<T>({workers.count * work.scratch()});
    Tensor partial = make<T>({need_weight ? (workers.count - 1) * outputs * channels : 0});
    T* parts = static_cast<T*>(partial.data_ptr());
    std::vector<double> totals(kSums<G> * workers.count * channels);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      T* part = w == 0 || !need_weight ? total : parts + (w - 1) * outputs * channels;
      dispatch<Backward<S, G, kTaps>>(work, first * kMicroRows, std::min(last * kMicroRows, rows),
                                      static_cast<T*>(scratch.data_ptr()) + w * work.scratch(),
                                      &totals[kSums<G> * w * channels], part);
    });
    total_sums<G>(totals.data(), workers.count, channels, work.read, credited,
                  static_cast<T*>(dbeta.data_ptr()), static_cast<T*>(dgamma.data_ptr()));
    for (int64_t w = 1; need_weight && w < workers.count; ++w) {
      const T* part = parts + (w - 1) * outputs * channels;
      for (int64_t i = 0; i < outputs * channels; ++i) total[i] += part[i];
    }
    return std::make_tuple(dbeta, dgamma, dweight);
  };
  return with_dtypes(x, g, run);
}

// ---- operations

Tensor bn_relu_conv1x1(const Tensor& x, const Tensor& mean, const Tensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                       const Tensor& weight, const MaybeTensor& moments) {
  return forward(x, mean, var, gamma, beta, eps, weight, rows_of(x), Pixels<1>{}, moments);
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_conv1x1_backward(
    const Tensor& dz, const MaybeTensor& y, const MaybeTensor& y_mean, const MaybeTensor& y_var,
    const MaybeTensor& y_gamma, double y_eps, const MaybeTensor& y_dbeta,
    const MaybeTensor& y_dgamma, const Tensor& weight, const Tensor& x, const Tensor& mean,
    const Tensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
    const Tensor& g, bool add, const MaybeTensor& sums, bool need_weight) {
  return backward(dz, {y, y_mean, y_var, y_gamma, y_eps, y_dbeta, y_dgamma}, weight, x, mean, var,
                  gamma, beta, eps, g, add, sums, Pixels<1>{}, rows_of(x), need_weight);
}

Tensor bn_relu_pool_conv1x1(const Tensor& x, const Tensor& mean, const Tensor& var,
                            const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                            const Tensor& weight, int64_t n, int64_t h, int64_t w) {
  expect_images(x, n, h, w);
  return forward(x, mean, var, gamma, beta, eps, weight, n * (h / 2) * (w / 2), Pixels<4>{h, w},
                 {});
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_conv1x1_backward(
    const Tensor& dout, const Tensor& weight, const Tensor& x, const Tensor& mean,
    const Tensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
    const Tensor& g, bool add, const MaybeTensor& sums, int64_t n, int64_t h, int64_t w,
    bool need_weight) {
  expect_images(x, n, h, w);
  const MaybeTensor none;
  return backward(dout, {none, none, none, none, 0, none, none}, weight, x, mean, var, gamma, beta,
                  eps, g, add, sums, Pixels<4>{h, w}, n * (h / 2) * (w / 2), need_weight);
}

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&memdense::bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&memdense::bn_relu_conv1x1_backward));
  m.impl("bn_relu_pool_conv1x1", TORCH_BOX(&memdense::bn_relu_pool_conv1x1));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&memdense::bn_relu_pool_conv1x1_backward));
}
