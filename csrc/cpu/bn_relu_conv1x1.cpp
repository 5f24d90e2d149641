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
#include "moments.h"
#include "products1x1.h"
#include "tensors.h"
#include "vector.h"
#include "workers.h"

namespace memdense {
namespace {

// ---- forward

template <typename S, int kTaps, typename Products>
struct Forward {
  using T = Compute<S>;

  const S* x;
  int64_t x_row;
  Pixels<kTaps> pixels;
  Reader<T> read;
  int64_t outputs;
  const Products& products;
  S* y;  // [rows, outputs]

  // Rows first..last of y; with m2 not null also mean and m2 of its columns there.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const Forward& a, int64_t first, int64_t last, T* scratch,
                                  double* mean, double* m2) {
    const int64_t step = tile_rows<Products>(last - first);
    std::fill_n(scratch, a.products.forward_scratch(), T{0});
    for (int64_t top = first; top < last; top += step) {
      const int64_t rows = std::min(step, last - top);
      int64_t source[Products::kTileRows];
      for (int64_t r = 0; r < rows; ++r) source[r] = a.pixels.row(top + r);
      S* y = a.y + top * a.outputs;
      const auto read = [&](int64_t c, int64_t count, auto* z,
                            int64_t z_row) MEMDENSE_INLINE_LAMBDA {
        read_tile<S, T, kBytes>(a.x, a.x_row, source, a.pixels, a.read, c, count, rows, z, z_row);
      };
      a.products.template forward<kBytes>(read, rows, y, scratch);
      if (!m2) continue;
      for (int64_t c = 0; c < a.outputs; c += kTileColumns) {
        const Rows tile{rows, std::min(kTileColumns, a.outputs - c), a.outputs};
        merge_tile<S, T>(y + c, tile, top - first, mean + c, m2 + c);
      }
    }
  }
};

// f.operator()<Products>(), the fastest there are for matrices of S.
template <typename S, typename F>
auto with_products(const F& f) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (amx::available()) return f.template operator()<OnTiles>();
  }
  return f.template operator()<ByPanels<S>>();
}

template <int kTaps>
Tensor forward(const Tensor& x, const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, double eps, const Tensor& weight, int64_t rows,
               Pixels<kTaps> pixels, const MaybeTensor& moments) {
  const auto run = [&]<typename S, typename Products>() {
    using T = Compute<S>;
    using Kernel = Forward<S, kTaps, Products>;
    constexpr int64_t kUnit = Products::kUnit;
    const int64_t channels = x.size(1), outputs = rows_of(weight);
    Tensor y = make<S>({rows, outputs});
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, channels);
    Products products(outputs, channels, true);
    products.pack(weight);
    const Kernel work{matrix<const S>(x, x.size(0), channels, "x"),
                      x.stride(0),
                      pixels,
                      vectors.reader(),
                      outputs,
                      products,
                      static_cast<S*>(y.data_ptr())};

    if (rows == 0) return y;
    const Workers workers(pieces(rows, kUnit));
    const int64_t size = products.forward_scratch();
    Tensor scratch = make<T>({workers.count * size});
    const TwoRows<T> statistics(moments, outputs, "moments");
    std::vector<double> parts(moments ? 2 * workers.count * outputs : 0);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      double* worker_mean = moments ? &parts[2 * w * outputs] : nullptr;
      double* worker_m2 = moments ? worker_mean + outputs : nullptr;
      Products::template run<Kernel>(work, first * kUnit, std::min(last * kUnit, rows),
                                     static_cast<T*>(scratch.data_ptr()) + w * size, worker_mean,
                                     worker_m2);
    });
    for (int64_t c = 0; moments && c < outputs; ++c) {
      double total_mean = 0, total_m2 = 0;
      for (int64_t w = 0; w < workers.count; ++w) {
        const double before = static_cast<double>(workers.first(w) * kUnit);
        const double end =
            std::min(static_cast<double>(workers.first(w + 1) * kUnit), static_cast<double>(rows));
        const double* part = &parts[2 * w * outputs + c];
        merge(before, total_mean, total_m2, end - before, part[0], part[outputs]);
      }
      statistics.first[c] = static_cast<T>(total_mean);
      statistics.second[c] = static_cast<T>(total_m2 / static_cast<double>(rows));
    }
    return y;
  };
  return with_dtype(x, [&]<typename S>(S) {
    return with_products<S>(
        [&]<typename Products>() { return run.template operator()<S, Products>(); });
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

template <typename S, typename G, int kTaps, typename Products>
struct Backward {
  using T = Compute<S>;
  using Value = typename Products::Value;

  Incoming<S> incoming;
  const S* x;
  int64_t x_row;
  G* g;
  int64_t g_row;
  bool add;
  Pixels<kTaps> pixels;
  Reader<T> read;
  int64_t channels, outputs;
  const Products& products;

  template <int kBytes>
  static MEMDENSE_INLINE void incoming_tile(const Incoming<S>& in, int64_t top, int64_t rows,
                                            int64_t outputs, Value* dy, int64_t dy_row) {
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
  static MEMDENSE_INLINE void run(const Backward& a, int64_t first, int64_t last, T* scratch,
                                  double* sums, T* dweight) {
    const Products& products = a.products;
    const int64_t step = tile_rows<Products>(last - first);
    std::fill_n(scratch, products.backward_scratch(), T{0});
    const typename Products::template Buffers<kBytes> at(products, scratch);
    for (int64_t top = first; top < last; top += step) {
      const int64_t rows = std::min(step, last - top);
      int64_t source[Products::kTileRows];
      for (int64_t r = 0; r < rows; ++r) source[r] = a.pixels.row(top + r);
      incoming_tile<kBytes>(a.incoming, top, rows, a.outputs, at.dy, products.dy_row());
      products.incoming(at, rows, dweight != nullptr);
      for (int64_t j = 0; j < a.channels; j += at.panel) {
        const int64_t columns = std::min(at.panel, a.channels - j);
        products.da(at, rows, j, columns);
        const Answer<S, T, G, kTaps, Value> answer{.rows = rows,
                                                   .source = source,
                                                   .pixels = a.pixels,
                                                   .da = at.da,
                                                   .da_row = at.panel,
                                                   .x = a.x,
                                                   .x_row = a.x_row,
                                                   .g = a.g,
                                                   .g_row = a.g_row,
                                                   .add = a.add,
                                                   .read = a.read,
                                                   .sums = sums,
                                                   .channels = a.channels,
                                                   .z = dweight ? at.z : nullptr,
                                                   .z_row = at.panel};
        answer_tile<kBytes, true>(answer, j, columns);
        if (dweight) products.dweight(at, rows, j, columns, dweight, top > first);
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
  const auto run = [&]<typename S, typename G, typename Products>() {
    using T = Compute<S>;
    using Kernel = Backward<S, G, kTaps, Products>;
    constexpr int64_t kUnit = Products::kUnit;
    const int64_t channels = x.size(1), outputs = rows_of(weight);
    Tensor dbeta = make<T>({channels}), dgamma = make<T>({channels});
    Tensor dweight = make<T>({need_weight ? outputs : 0, channels});
    T* total = need_weight ? static_cast<T*>(dweight.data_ptr()) : nullptr;
    Products products(outputs, channels, false);
    products.pack(weight);
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
    Kernel work{.incoming = incoming,
                .x = matrix<const S>(x, x.size(0), channels, "x"),
                .x_row = x.stride(0),
                .g = matrix<G>(g, x.size(0), channels, "g"),
                .g_row = g.stride(0),
                .add = add,
                .pixels = pixels,
                .read = vectors.reader(),
                .channels = channels,
                .outputs = outputs,
                .products = products};

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
    const Workers workers(pieces(rows, kUnit));
    const int64_t size = products.backward_scratch();
    Tensor scratch = make<T>({workers.count * size});
    Tensor partial = make<T>({need_weight ? (workers.count - 1) * outputs * channels : 0});
    T* parts = static_cast<T*>(partial.data_ptr());
    std::vector<double> totals(kSums<G> * workers.count * channels);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      T* part = w == 0 || !need_weight ? total : parts + (w - 1) * outputs * channels;
      Products::template run<Kernel>(work, first * kUnit, std::min(last * kUnit, rows),
                                     static_cast<T*>(scratch.data_ptr()) + w * size,
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
  return with_dtypes(x, g, [&]<typename S, typename G>(S, G) {
    return with_products<S>(
        [&]<typename Products>() { return run.template operator()<S, G, Products>(); });
  });
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

// ---- memory

// Bytes of tensors that a 1x1 takes beside its results, `rows` being those of its product, on so
// many threads: its forward, or its backward.
int64_t conv1x1_scratch(int64_t rows, int64_t channels, int64_t outputs, int64_t threads,
                        bool bfloat16, bool backward) {
  STD_TORCH_CHECK(std::min({rows, channels, outputs, threads}) >= 1,
                  "conv1x1_scratch: expected sizes and threads of at least 1");
  STD_TORCH_CHECK(
      rows < int64_t{1} << 48 && std::max(channels, outputs) < 1 << 20 && threads < 1 << 16,
      "conv1x1_scratch: expected rows below 2^48, channels below 2^20 and threads "
      "below 2^16");
  const auto bytes = [&]<typename Products>() -> int64_t {
    const Products products(outputs, channels, !backward);
    const int64_t workers = worker_count(pieces(rows, Products::kUnit), threads);
    const int64_t each = backward ? products.backward_scratch() : products.forward_scratch();
    const int64_t partial = backward ? (workers - 1) * outputs * channels : 0;
    return products.packed_bytes() +
           std::max<int64_t>(products.packing_bytes(), (workers * each + partial) * sizeof(float));
  };
  return bfloat16 ? with_products<BFloat16>(bytes) : with_products<float>(bytes);
}

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CompositeExplicitAutograd, m) {
  m.impl("conv1x1_scratch", TORCH_BOX(&memdense::conv1x1_scratch));
}

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&memdense::bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&memdense::bn_relu_conv1x1_backward));
  m.impl("bn_relu_pool_conv1x1", TORCH_BOX(&memdense::bn_relu_pool_conv1x1));
  m.impl("bn_relu_pool_conv1x1_backward", TORCH_BOX(&memdense::bn_relu_pool_conv1x1_backward));
}
