// max_pool3x3(relu(scale * x + shift)) with stride 2 and padding 1, as a stem has it: x [N*H*W, C]
// to [N*H'*W', C], and the winner in its window, 0 to 8 in reading order, as one byte.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "answer.h"
#include "tensors.h"
#include "vector.h"
#include "workers.h"

namespace memdense {
namespace {

struct Window {
  int64_t h, w;  // of the source
  int64_t out_h() const { return (h + 1) / 2; }
  int64_t out_w() const { return (w + 1) / 2; }
};

template <typename S>
struct MaxPool {
  using T = Compute<S>;

  const S* x;
  int64_t x_row;
  Reader<T> read;
  Window window;
  int64_t columns;
  S* out;
  uint8_t* winner;

  static constexpr int64_t kColumns = 256;
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

  // best = max(best, scale * x + shift): the first of equal values wins and the last NaN, as in
  // PyTorch's max-pool. GCC makes vectors of this only without the relu, which can wait.
  static MEMDENSE_INLINE void take(const S* x, const T* scale, const T* shift, int64_t columns,
                                   Index tap, T* __restrict__ best, Index* __restrict__ winner) {
    for (int64_t j = 0; j < columns; ++j) {
      const T z = load(x[j]) * scale[j] + shift[j];
      const bool better = (z > best[j]) | (z != z);
      best[j] = better ? z : best[j];
      winner[j] = better ? tap : winner[j];
    }
  }

  // Output lines first..last, counted over all images.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const MaxPool& k, int64_t first, int64_t last) {
    const Window& s = k.window;
    for (int64_t line = first; line < last; ++line) {
      const int64_t image = line / s.out_h(), oy = line % s.out_h();
      for (int64_t ox = 0; ox < s.out_w(); ++ox) {
        const int64_t pixel = line * s.out_w() + ox;
        for (int64_t c = 0; c < k.columns; c += kColumns) {
          const int64_t columns = std::min(kColumns, k.columns - c);
          T best[kColumns];
          Index winner[kColumns];
          // where nothing is above 0 all are 0 after the relu, and the first in the image wins
          const Index first_tap = (oy == 0 ? 3 : 0) + (ox == 0 ? 1 : 0);
          std::fill_n(best, columns, -std::numeric_limits<T>::infinity());
          for (int tap = 0; tap < 9; ++tap) {
            const int64_t y = 2 * oy - 1 + tap / 3, x = 2 * ox - 1 + tap % 3;
            if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;
            const int64_t row = (image * s.h + y) * s.w + x;
            take(k.x + row * k.x_row + c, k.read.scale + c, k.read.shift + c, columns, tap, best,
                 winner);
          }
          for (int64_t j = 0; j < columns; ++j) {
            const bool none = best[j] <= 0;
            store(k.out[pixel * k.columns + c + j], none ? T{0} : best[j]);
            k.winner[pixel * k.columns + c + j] =
                static_cast<uint8_t>(none ? first_tap : winner[j]);
          }
        }
      }
    }
  }
};

// What dz = da * [z > 0] adds to the sums, with da a pixel's sum of dout over the windows it won;
// or, where there is an out, the gradient behind the norm, a * dz + b * x + c.
template <typename S>
struct Unpool {
  using T = Compute<S>;

  const S* dout;
  int64_t dout_row;
  const uint8_t* winner;
  const S* x;
  int64_t x_row;
  Reader<T> read;
  Window window;
  int64_t columns;
  const T *a, *b, *c;
  S* out;  // may be x
  int64_t out_row;

  static constexpr int64_t kColumns = 256;
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

  static MEMDENSE_INLINE void add_up(const S* x, const T* scale, const T* shift, const T* mean,
                                     int64_t columns, const T* da, T* __restrict__ dbeta,
                                     T* __restrict__ dgamma) {
    for (int64_t j = 0; j < columns; ++j) {
      const T value = load(x[j]), dz = value * scale[j] + shift[j] <= 0 ? 0 : da[j];
      dbeta[j] += dz;
      dgamma[j] += dz * (value - mean[j]);
    }
  }

  static MEMDENSE_INLINE void normalise(const S* x, const T* scale, const T* shift, const T* a,
                                        const T* b, const T* c, int64_t columns,
                                        T* __restrict__ da) {
    for (int64_t j = 0; j < columns; ++j) {
      const T value = load(x[j]), dz = value * scale[j] + shift[j] <= 0 ? 0 : da[j];
      da[j] = a[j] * dz;
      if (b) da[j] += b[j] * value + c[j];
    }
  }

  // Source lines first..last, counted over all images: each pixel gathers from the (at most four)
  // windows it is in, in the order of its place in them. sums [2][columns]; part is scratch.
  template <int kBytes>
  static MEMDENSE_INLINE void run(const Unpool& k, int64_t first, int64_t last, T* part,
                                  double* sums) {
    const Window& s = k.window;
    T *dbeta = part, *dgamma = part + k.columns;
    for (int64_t line = first; line < last; ++line) {
      const int64_t image = line / s.h, y = line % s.h;
      for (int64_t left = 0; left < s.w; left += kSumRows) {
        if (!k.out) std::fill_n(part, 2 * k.columns, T{0});
        for (int64_t x = left; x < std::min(s.w, left + kSumRows); ++x) {
          const int64_t row = line * s.w + x;
          for (int64_t c = 0; c < k.columns; c += kColumns) {
            const int64_t columns = std::min(kColumns, k.columns - c);
            T da[kColumns] = {};
            for (int64_t oy = std::min((y + 1) / 2, s.out_h() - 1); oy >= y / 2; --oy) {
              for (int64_t ox = std::min((x + 1) / 2, s.out_w() - 1); ox >= x / 2; --ox) {
                const int64_t pixel = (image * s.out_h() + oy) * s.out_w() + ox;
                const Index tap = 3 * (y - 2 * oy + 1) + x - 2 * ox + 1;
                const S* d = k.dout + pixel * k.dout_row + c;
                const uint8_t* winner = k.winner + pixel * k.columns + c;
                for (int64_t j = 0; j < columns; ++j) {
                  da[j] += static_cast<Index>(winner[j]) == tap ? load(d[j]) : T{0};
                }
              }
            }
            const S* at = k.x + row * k.x_row + c;
            const T *scale = k.read.scale + c, *shift = k.read.shift + c;
            if (k.out) {
              const T *b = k.b ? k.b + c : nullptr, *constant = k.b ? k.c + c : nullptr;
              normalise(at, scale, shift, k.a + c, b, constant, columns, da);
              S* out = k.out + row * k.out_row + c;
              for (int64_t j = 0; j < columns; ++j) store(out[j], da[j]);
            } else {
              add_up(at, scale, shift, k.read.mean + c, columns, da, dbeta + c, dgamma + c);
            }
          }
        }
        for (int64_t i = 0; !k.out && i < 2 * k.columns; ++i) sums[i] += part[i];
      }
    }
  }
};

std::tuple<Tensor, Tensor> bn_relu_maxpool(const Tensor& x, const Tensor& mean, const Tensor& var,
                                           const MaybeTensor& gamma, const MaybeTensor& beta,
                                           double eps, int64_t n, int64_t h, int64_t w) {
  expect_images(x, n, h, w);
  return with_dtype(x, [&]<typename S>(S) {
    const Window window{h, w};
    const int64_t columns = x.size(1), rows = n * window.out_h() * window.out_w();
    const auto vectors = norm<Compute<S>>(mean, var, gamma, beta, eps, columns);
    Tensor out = make<S>({rows, columns});
    Tensor winner = empty(ScalarType::Byte, {rows, columns});
    const MaxPool<S> work{matrix<const S>(x, x.size(0), columns, "x"),
                          x.stride(0),
                          vectors.reader(),
                          window,
                          columns,
                          static_cast<S*>(out.data_ptr()),
                          static_cast<uint8_t*>(winner.data_ptr())};
    Workers(n * window.out_h()).run([&](int64_t, int64_t first, int64_t last) {
      dispatch<MaxPool<S>>(work, first, last);
    });
    return std::make_tuple(out, winner);
  });
}

// Without where the results go.
template <typename S>
Unpool<S> unpool(const Tensor& dout, const Tensor& winner, const Tensor& x,
                 const Norm<Compute<S>>& vectors, Window window, int64_t n) {
  const int64_t columns = x.size(1), rows = n * window.out_h() * window.out_w();
  STD_TORCH_CHECK(winner.is_contiguous() && winner.scalar_type() == ScalarType::Byte &&
                      winner.numel() == rows * columns,
                  "memdense: expected winner as bn_relu_maxpool returned it, got ",
                  described(winner));
  Unpool<S> work{};
  work.dout = matrix<const S>(dout, rows, columns, "dout"), work.dout_row = dout.stride(0);
  work.winner = static_cast<const uint8_t*>(winner.data_ptr());
  work.x = matrix<const S>(x, x.size(0), columns, "x"), work.x_row = x.stride(0);
  work.read = vectors.reader(), work.window = window, work.columns = columns;
  return work;
}

// Returns what each worker summed, [worker][2][columns], or nothing where there is an out.
template <typename S>
std::vector<double> run(const Unpool<S>& work, const Workers& workers) {
  std::vector<Compute<S>> part(work.out ? 0 : 2 * workers.count * work.columns);
  std::vector<double> sums(part.size());
  workers.run([&](int64_t worker, int64_t first, int64_t last) {
    const int64_t own = 2 * worker * work.columns;
    dispatch<Unpool<S>>(work, first, last, part.data() + own, sums.data() + own);
  });
  return sums;
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_sums(const Tensor& dout, const Tensor& winner,
                                                const Tensor& x, const Tensor& mean,
                                                const Tensor& var, const MaybeTensor& gamma,
                                                const MaybeTensor& beta, double eps, int64_t n,
                                                int64_t h, int64_t w) {
  expect_images(x, n, h, w);
  return with_dtype(x, [&]<typename S>(S) {
    using T = Compute<S>;
    const int64_t columns = x.size(1);
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, columns);
    const Unpool<S> work = unpool<S>(dout, winner, x, vectors, {h, w}, n);
    Tensor dbeta = make<T>({columns}), dgamma = make<T>({columns});
    const Workers workers(n * h);
    total_sums<T>(run(work, workers).data(), workers.count, columns, work.read, {},
                  static_cast<T*>(dbeta.data_ptr()), static_cast<T*>(dgamma.data_ptr()));
    return std::make_tuple(dbeta, dgamma);
  });
}

void bn_relu_maxpool_backward(const Tensor& dout, const Tensor& winner, const Tensor& x,
                              const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
                              const MaybeTensor& beta, double eps, const Tensor& dbeta,
                              const Tensor& dgamma, bool batch, int64_t n, int64_t h, int64_t w,
                              const Tensor& out) {
  expect_images(x, n, h, w);
  with_dtype(x, [&]<typename S>(S) {
    using T = Compute<S>;
    const int64_t rows = x.size(0), columns = x.size(1);
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, columns);
    const NormGradient<T> gradient =
        norm_gradient<T>(mean, var, gamma, eps, dbeta, dgamma, columns, rows, batch);
    Unpool<S> work = unpool<S>(dout, winner, x, vectors, {h, w}, n);
    work.a = data_or_null(gradient.a);
    work.b = data_or_null(gradient.b), work.c = data_or_null(gradient.c);
    work.out = matrix<S>(out, rows, columns, "out"), work.out_row = out.stride(0);
    run(work, Workers(n * h));
  });
}

}  // namespace
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("bn_relu_maxpool", TORCH_BOX(&memdense::bn_relu_maxpool));
  m.impl("bn_relu_maxpool_sums", TORCH_BOX(&memdense::bn_relu_maxpool_sums));
  m.impl("bn_relu_maxpool_backward", TORCH_BOX(&memdense::bn_relu_maxpool_backward));
}
