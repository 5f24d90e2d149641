// Of tensors that operations are given, on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>

namespace memdense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// "(2, 3)"
inline std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t a = 0; a < t.dim(); ++a) {
    text += (a ? ", " : "") + std::to_string(t.size(a));
  }
  return text + ")";
}

// "Float (2, 3) with strides (3, 1)"
inline std::string described(const Tensor& t) {
  std::string text = torch::headeronly::toString(t.scalar_type());
  text.append(" ").append(shape(t)).append(" with strides (");
  for (int64_t a = 0; a < t.dim(); ++a) {
    text.append(a ? ", " : "").append(std::to_string(t.stride(a)));
  }
  return text.append(")");
}

inline void expect_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "memdense: expected ", name, " in ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void expect_vector(const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && (size <= 1 || t.stride(0) == 1),
                  "memdense: expected ", name, " to be a contiguous vector of ", size, ", got ",
                  described(t));
}

inline void expect_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "memdense: expected ",
                  name, " of shape (", rows, ", ", columns, "), got ", shape(t));
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, "memdense: expected ", name,
                  " with unit column stride, got ", described(t));
}

// That no two values of a tensor that is written share their memory.
inline void expect_apart(const char* name, const Tensor& t) {
  for (int64_t a = 0; a < t.dim(); ++a) {
    STD_TORCH_CHECK(t.size(a) <= 1 || t.stride(a) != 0, "memdense: expected ", name,
                    " not to be expanded, got ", described(t));
  }
}

// Whether so many rows are the pixels of n images, whatever their product is in 64 bits.
inline bool are_images(int64_t rows, int64_t n, int64_t h, int64_t w) {
  return n > 0 && h > 0 && w > 0 && rows % w == 0 && rows / w % h == 0 && rows / w / h == n;
}

}  // namespace memdense
