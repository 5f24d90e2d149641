// From tensors to what kernels take, with the checks between.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "answer.h"
#include "memory.h"
#include "norm.h"

namespace memdense {

template <typename T>
constexpr ScalarType kScalarType =
    std::is_same_v<std::remove_const_t<T>, double>     ? ScalarType::Double
    : std::is_same_v<std::remove_const_t<T>, BFloat16> ? ScalarType::BFloat16
    : std::is_same_v<std::remove_const_t<T>, bool>     ? ScalarType::Bool
                                                       : ScalarType::Float;

template <typename T, size_t kDims>
Tensor make(const int64_t (&size)[kDims]) {
  return empty(kScalarType<T>, size);
}

// The data of a (rows, columns) matrix with unit column stride and any row stride.
template <typename T>
T* matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  expect_dtype(name, t, kScalarType<T>);
  expect_matrix(name, t, rows, columns);
  if constexpr (!std::is_const_v<T>) expect_apart(name, t);
  return static_cast<T*>(t.data_ptr());
}

// The data of a vector; null where there is none.
template <typename T>
T* vector(const MaybeTensor& t, int64_t size, const char* name) {
  if (!t) return nullptr;
  expect_dtype(name, *t, kScalarType<T>);
  expect_vector(name, *t, size);
  return static_cast<T*>(t->data_ptr());
}

// A weight or a parameter as kernels compute with it.
template <typename T>
Tensor as_computed(const Tensor& t) {
  const bool narrow =
      kScalarType<T> == ScalarType::Float && t.scalar_type() == ScalarType::BFloat16;
  return narrow ? torch::stable::to(t, ScalarType::Float) : t;
}

template <typename T>
std::vector<T> values(const MaybeTensor& given, int64_t size, const char* name, T missing) {
  const MaybeTensor t = given ? MaybeTensor(as_computed<T>(*given)) : given;
  const T* found = vector<const T>(t, size, name);
  return found ? std::vector<T>(found, found + size) : std::vector<T>(size, missing);
}

template <typename T>
Norm<T> norm(const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
             const MaybeTensor& beta, double eps, int64_t channels) {
  return {vector<const T>(mean, channels, "mean"), vector<const T>(var, channels, "var"),
          values<T>(gamma, channels, "gamma", 1), values<T>(beta, channels, "beta", 0),
          static_cast<T>(eps)};
}

// The gradient behind the norm; with `batch` its backward left dbeta and dgamma of `rows` rows.
template <typename T>
NormGradient<T> norm_gradient(const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
                              double eps, const Tensor& dbeta, const Tensor& dgamma,
                              int64_t channels, int64_t rows, bool batch) {
  const Norm<T> behind = norm<T>(mean, var, gamma, {}, eps, channels);
  return batch ? NormGradient<T>::batch(behind, vector<const T>(dbeta, channels, "dbeta"),
                                        vector<const T>(dgamma, channels, "dgamma"), rows)
               : NormGradient<T>::running(behind);
}

// A vector's data; null where it is empty.
template <typename T>
const T* data_or_null(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

// How many, before anybody has seen that it is a matrix.
inline int64_t rows_of(const Tensor& t) { return t.dim() > 0 ? t.size(0) : 0; }

// x's rows are the pixels of n images.
inline void expect_images(const Tensor& x, int64_t n, int64_t h, int64_t w) {
  const int64_t rows = x.dim() == 2 ? x.size(0) : 0;
  STD_TORCH_CHECK(are_images(rows, n, h, w), "memdense: expected a matrix x of ", n, " images of ",
                  h, " by ", w, " pixels, got ", rows, " rows");
}

// Calls f with a value as the tensor is of.
template <typename F>
auto with_value(const char* name, const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  if (t.scalar_type() == ScalarType::BFloat16) return f(BFloat16{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "memdense: expected ", name,
                  " in Float, Double or BFloat16, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return f(float{});
}

// The same of a matrix.
template <typename F>
auto with_dtype(const Tensor& x, const F& f) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0,
                  "memdense: expected a matrix x with at least one row and column, got ", shape(x));
  return with_value("x", x, f);
}

// Calls f with a value as x is of and one as its gradient g is, which may be what x's compute in.
template <typename F>
auto with_dtypes(const Tensor& x, const Tensor& g, const F& f) {
  return with_dtype(x, [&]<typename S>(S value) {
    if constexpr (!std::is_same_v<S, Compute<S>>) {
      if (g.scalar_type() == kScalarType<S>) return f(value, value);
    }
    return f(value, Compute<S>{});
  });
}

// The rows of a (2, channels) matrix; null where there is none.
template <typename T>
struct TwoRows {
  T *first = nullptr, *second = nullptr;

  TwoRows() = default;
  TwoRows(const MaybeTensor& t, int64_t channels, const char* name) {
    if (!t) return;
    first = matrix<T>(*t, 2, channels, name);
    second = first + t->stride(0);
  }
};

// dbeta and dgamma from what `count` workers summed, in their order: sums
// [worker][kSums][channels]. The reader's share of them, s * dbeta and s * r * dgamma, is added to
// `credited`; where G rounds, that of what it took in.
template <typename G, typename T>
void total_sums(const double* sums, int64_t count, int64_t channels, const Reader<T>& read,
                const TwoRows<T>& credited, T* dbeta, T* dgamma) {
  for (int64_t c = 0; c < channels; ++c) {
    double total[kSums<G>] = {};
    for (int64_t w = 0; w < count; ++w) {
      for (int64_t s = 0; s < kSums<G>; ++s) total[s] += sums[(kSums<G> * w + s) * channels + c];
    }
    dbeta[c] = static_cast<T>(total[0]);
    dgamma[c] = static_cast<T>(total[1] * read.rstd[c]);
    if (!credited.first) continue;
    if constexpr (kRounds<G>) {
      credited.first[c] += static_cast<T>(total[2]);
      credited.second[c] += static_cast<T>(total[3] * read.rstd[c]) * read.rstd[c];
    } else {
      credited.first[c] += read.scale[c] * dbeta[c];
      credited.second[c] += read.scale[c] * read.rstd[c] * dgamma[c];
    }
  }
}

}  // namespace memdense
