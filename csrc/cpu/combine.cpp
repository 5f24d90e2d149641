// What reads and writes each value once: dy = g + p * x + q, BatchNorm and ReLU on their own,
// and their mean over images; with their backwards into G.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "answer.h"
#include "tensors.h"
#include "vector.h"
#include "workers.h"

namespace memdense {
namespace {

// Rows of a tile, and values that are worth a thread.
constexpr int64_t kTileRows = 64;
constexpr int64_t kGrain = 16384;

// Workers over rows that are worth it.
Workers row_workers(int64_t rows, int64_t columns) {
  return Workers(rows, worker_count(std::min(rows, rows * columns / kGrain)));
}

// ---- dy = g + p * x + q, times factor or 0 where there is a mask; null vectors: p = q = 0

template <typename S, typename G>
struct Settle {
  using T = Compute<S>;

  const G* g;
  int64_t g_row;
  const S* x;
  int64_t x_row;
  const T *p, *q;
  const bool* keep;
  int64_t keep_row;
  T factor;
  S* dy;
  int64_t columns;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const Settle& k, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const G* g = k.g + r * k.g_row;
      const S* x = k.x + r * k.x_row;
      S* dy = k.dy + r * k.columns;
      const bool* keep = k.keep + r * k.keep_row;
      for_columns<T, kBytes, 1>(
          0, k.columns, [&]<typename Vec, int>(int64_t j) MEMDENSE_INLINE_LAMBDA {
            Vec v = load<Vec>(g + j);
            if (k.p) {
              v += load<Vec>(x + j) * load<Vec>(k.p + j);
              v += load<Vec>(k.q + j);
            }
            // a product, not a choice: what was infinite or NaN stays so, as with PyTorch's dropout
            if (k.keep) v *= load_bools<Vec>(keep + j) != T{0} ? Vec{} + k.factor : Vec{};
            store(dy + j, v);
          });
    }
  }
};

// dy = g + p * x + q with p = -S2 / M and q = -S1 / M - p * mean, for the M rows of x
Tensor settle(const Tensor& g, const Tensor& x, const MaybeTensor& sums, const MaybeTensor& mean,
              const MaybeTensor& keep, double factor) {
  const auto run = [&]<typename S, typename G>(S, G) {
    using T = Compute<S>;
    const int64_t rows = x.size(0), columns = x.size(1);
    STD_TORCH_CHECK(!sums == !mean, "memdense: sums and mean go together");
    std::vector<T> p, q;
    if (sums) {
      const T *s1 = matrix<const T>(*sums, 2, columns, "sums"), *s2 = s1 + sums->stride(0);
      const T *average = vector<const T>(mean, columns, "mean"), m = static_cast<T>(rows);
      p.resize(columns), q.resize(columns);
      for (int64_t c = 0; c < columns; ++c) {
        p[c] = -s2[c] / m;
        q[c] = -s1[c] / m - p[c] * average[c];
      }
    }
    Tensor dy = make<S>({rows, columns});
    const Settle<S, G> work{matrix<const G>(g, rows, columns, "g"),
                            g.stride(0),
                            matrix<const S>(x, rows, columns, "x"),
                            x.stride(0),
                            data_or_null(p),
                            data_or_null(q),
                            keep ? matrix<const bool>(*keep, rows, columns, "keep") : nullptr,
                            keep ? keep->stride(0) : 0,
                            static_cast<T>(factor),
                            static_cast<S*>(dy.data_ptr()),
                            columns};
    row_workers(rows, columns).run([&](int64_t, int64_t first, int64_t last) {
      dispatch<Settle<S, G>>(work, first, last);
    });
    return dy;
  };
  return with_dtypes(x, g, run);
}

// ---- relu(scale * x + shift): a packed matrix, or its mean over each image's rows

template <typename S>
struct Read {
  using T = Compute<S>;

  const S* x;
  int64_t x_row;
  Reader<T> read;
  int64_t columns;
  bool relu;
  S* out;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const Read& k, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const S* x = k.x + r * k.x_row;
      S* out = k.out + r * k.columns;
      for_columns<T, kBytes, 1>(
          0, k.columns, [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
            const Vec v =
                load<Vec>(x + c) * load<Vec>(k.read.scale + c) + load<Vec>(k.read.shift + c);
            store(out + c, k.relu ? (v <= T{0} ? Vec{} : v) : v);
          });
    }
  }
};

template <typename S>
struct ReadMean {
  using T = Compute<S>;

  const S* x;
  int64_t x_row;
  Reader<T> read;
  int64_t columns, pixels;
  S* out;

  // Images first..last; total [columns] is scratch.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const ReadMean& k, int64_t first, int64_t last, double* total) {
    for (int64_t n = first; n < last; ++n) {
      std::fill_n(total, k.columns, 0.0);
      for_columns<T, kBytes, 1>(
          0, k.columns, [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
            const Vec scale = load<Vec>(k.read.scale + c), shift = load<Vec>(k.read.shift + c);
            for (int64_t top = 0; top < k.pixels; top += kSumRows) {
              Vec sum = Vec{};
              for (int64_t r = top; r < std::min(k.pixels, top + kSumRows); ++r) {
                const Vec v = load<Vec>(k.x + (n * k.pixels + r) * k.x_row + c) * scale + shift;
                sum += v <= T{0} ? Vec{} : v;
              }
              T part[sizeof(Vec) / sizeof(T)];
              std::memcpy(part, &sum, sizeof(sum));
              for (size_t i = 0; i < sizeof(Vec) / sizeof(T); ++i) total[c + i] += part[i];
            }
          });
      for (int64_t c = 0; c < k.columns; ++c) {
        const double mean = total[c] / static_cast<double>(k.pixels);
        store(k.out[n * k.columns + c], static_cast<T>(mean));
      }
    }
  }
};

Tensor bn_relu(const Tensor& x, const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, double eps, bool relu) {
  return with_dtype(x, [&]<typename S>(S) {
    const int64_t rows = x.size(0), columns = x.size(1);
    Tensor out = make<S>({rows, columns});
    const auto vectors = norm<Compute<S>>(mean, var, gamma, beta, eps, columns);
    const Read<S> work{
        matrix<const S>(x, rows, columns, "x"), x.stride(0), vectors.reader(), columns, relu,
        static_cast<S*>(out.data_ptr())};
    row_workers(rows, columns).run([&](int64_t, int64_t first, int64_t last) {
      dispatch<Read<S>>(work, first, last);
    });
    return out;
  });
}

Tensor bn_relu_mean(const Tensor& x, const Tensor& mean, const Tensor& var,
                    const MaybeTensor& gamma, const MaybeTensor& beta, double eps, int64_t images) {
  return with_dtype(x, [&]<typename S>(S) {
    const int64_t rows = x.size(0), columns = x.size(1);
    STD_TORCH_CHECK(images > 0 && rows % images == 0, "memdense: expected the rows of ", images,
                    " whole images, got ", rows);
    Tensor out = make<S>({images, columns});
    const auto vectors = norm<Compute<S>>(mean, var, gamma, beta, eps, columns);
    const ReadMean<S> work{matrix<const S>(x, rows, columns, "x"),
                           x.stride(0),
                           vectors.reader(),
                           columns,
                           rows / images,
                           static_cast<S*>(out.data_ptr())};
    const Workers workers(images);
    std::vector<double> total(workers.count * columns);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      dispatch<ReadMean<S>>(work, first, last, &total[w * columns]);
    });
    return out;
  });
}

// ---- their backwards: g += scale * dz, and the sums

template <typename S, typename G, bool kRelu>
struct Answers {
  using T = Compute<S>;

  const S* da;
  int64_t da_row, da_shared;  // one row of da for the mean of so many rows of x
  const S* x;
  int64_t x_row;
  G* g;
  int64_t g_row;
  bool add;
  Reader<T> read;
  int64_t columns;

  static constexpr int64_t kColumns = 256;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const Answers& k, int64_t first, int64_t last, double* sums) {
    T shared[kColumns];
    for (int64_t top = first, rows; top < last; top += rows) {
      // a tile lies in one image where its rows share a gradient
      const int64_t image = top / k.da_shared;
      rows = std::min(kTileRows, last - top);
      if (k.da_shared > 1) rows = std::min(rows, (image + 1) * k.da_shared - top);
      int64_t source[kTileRows];
      for (int64_t r = 0; r < rows; ++r) source[r] = top + r;
      for (int64_t c = 0; c < k.columns; c += kColumns) {
        const int64_t columns = std::min(kColumns, k.columns - c);
        const auto answer = [&]<typename D>(const D* da, int64_t da_row) MEMDENSE_INLINE_LAMBDA {
          const Answer<S, D, G, 1> tile{.rows = rows,
                                        .source = source,
                                        .pixels = {},
                                        .da = da,
                                        .da_row = da_row,
                                        .x = k.x,
                                        .x_row = k.x_row,
                                        .g = k.g,
                                        .g_row = k.g_row,
                                        .add = k.add,
                                        .read = k.read,
                                        .sums = sums,
                                        .channels = k.columns,
                                        .z = nullptr,
                                        .z_row = 0};
          answer_tile<kBytes, kRelu>(tile, c, columns);
        };
        const S* da = k.da + image * k.da_row + c;
        if (k.da_shared > 1) {
          for (int64_t j = 0; j < columns; ++j) shared[j] = load(da[j]) / k.da_shared;
          answer(shared, 0);
        } else {
          answer(da, k.da_row);
        }
      }
    }
  }
};

template <bool kRelu>
std::tuple<Tensor, Tensor> answers(const Tensor& dout, int64_t shared, const Tensor& x,
                                   const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
                                   const MaybeTensor& beta, double eps, const Tensor& g, bool add,
                                   const MaybeTensor& sums) {
  const auto run = [&]<typename S, typename G>(S, G) {
    using T = Compute<S>;
    const int64_t rows = x.size(0), columns = x.size(1);
    Tensor dbeta = make<T>({columns}), dgamma = make<T>({columns});
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, columns);
    const Answers<S, G, kRelu> work{matrix<const S>(dout, rows / shared, columns, "dout"),
                                    dout.stride(0),
                                    shared,
                                    matrix<const S>(x, rows, columns, "x"),
                                    x.stride(0),
                                    matrix<G>(g, rows, columns, "g"),
                                    g.stride(0),
                                    add,
                                    vectors.reader(),
                                    columns};
    const TwoRows<T> credited(sums, columns, "sums");
    const Workers workers = row_workers(rows, columns);
    std::vector<double> totals(kSums<G> * workers.count * columns);
    workers.run([&](int64_t w, int64_t first, int64_t last) {
      dispatch<Answers<S, G, kRelu>>(work, first, last, &totals[kSums<G> * w * columns]);
    });
    total_sums<G>(totals.data(), workers.count, columns, work.read, credited,
                  static_cast<T*>(dbeta.data_ptr()), static_cast<T*>(dgamma.data_ptr()));
    return std::make_tuple(dbeta, dgamma);
  };
  return with_dtypes(x, g, run);
}

std::tuple<Tensor, Tensor> bn_relu_backward(const Tensor& dout, const Tensor& x, const Tensor& mean,
                                            const Tensor& var, const MaybeTensor& gamma,
                                            const MaybeTensor& beta, double eps, bool relu,
                                            const Tensor& g, bool add, const MaybeTensor& sums) {
  if (relu) return answers<true>(dout, 1, x, mean, var, gamma, beta, eps, g, add, sums);
  return answers<false>(dout, 1, x, mean, var, gamma, beta, eps, g, add, sums);
}

std::tuple<Tensor, Tensor> bn_relu_mean_backward(const Tensor& dout, const Tensor& x,
                                                 const Tensor& mean, const Tensor& var,
                                                 const MaybeTensor& gamma, const MaybeTensor& beta,
                                                 double eps, const Tensor& g, bool add,
                                                 const MaybeTensor& sums) {
  STD_TORCH_CHECK(
      dout.dim() == 2 && dout.size(0) > 0 && x.dim() == 2 && x.size(0) % dout.size(0) == 0,
      "memdense: expected dout (images, C) of x's whole images, got ", shape(dout), " for x ",
      shape(x));
  return answers<true>(dout, x.size(0) / dout.size(0), x, mean, var, gamma, beta, eps, g, add,
                       sums);
}

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("settle", TORCH_BOX(&memdense::settle));
  m.impl("bn_relu", TORCH_BOX(&memdense::bn_relu));
  m.impl("bn_relu_backward", TORCH_BOX(&memdense::bn_relu_backward));
  m.impl("bn_relu_mean", TORCH_BOX(&memdense::bn_relu_mean));
  m.impl("bn_relu_mean_backward", TORCH_BOX(&memdense::bn_relu_mean_backward));
}
