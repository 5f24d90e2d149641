// What kernels take of a BatchNorm, made of its tensors as memdense/buffers.py writes it down.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace memdense {

// A BatchNorm as kernels see it: vectors of one value per channel.
template <typename T>
struct Reader {
  const T *scale, *shift, *mean, *rstd;

  Reader from(int64_t c) const { return {scale + c, shift + c, mean + c, rstd + c}; }
};

// r = 1 / sqrt(var + eps), s = gamma * r, t = beta - mean * s; `mean` must outlive it.
template <typename T>
struct Norm {
  const T* mean;
  std::vector<T> scale, shift, rstd;

  Norm(const T* mean, const T* var, std::vector<T> gamma, std::vector<T> beta, T eps)
      : mean(mean), scale(std::move(gamma)), shift(std::move(beta)), rstd(scale.size()) {
    for (size_t c = 0; c < rstd.size(); ++c) {
      rstd[c] = 1 / std::sqrt(var[c] + eps);
      scale[c] *= rstd[c];
      shift[c] -= mean[c] * scale[c];
    }
  }

  Reader<T> reader() const { return {scale.data(), shift.data(), mean, rstd.data()}; }
};

// The gradient behind a norm with one reader, dy = a * dz + b * y + c.
template <typename T>
struct NormGradient {
  std::vector<T> a, b, c;  // empty: a = 1, b = c = 0

  static NormGradient batch(const Norm<T>& norm, const T* dbeta, const T* dgamma, int64_t rows) {
    NormGradient gradient{norm.scale, norm.scale, norm.scale};
    const T m = static_cast<T>(rows);
    for (size_t i = 0; i < gradient.a.size(); ++i) {
      const T s = norm.scale[i];
      gradient.b[i] = -s * norm.rstd[i] * dgamma[i] / m;
      gradient.c[i] = -s * dbeta[i] / m - gradient.b[i] * norm.mean[i];
    }
    return gradient;
  }
  // running statistics do not answer
  static NormGradient running(const Norm<T>& norm) { return {norm.scale, {}, {}}; }
};

}  // namespace memdense
