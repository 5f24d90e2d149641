// New tensors without PyTorch's dispatcher, which looks operations up by name.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace memdense {

// Uninitialised, on the CPU.
template <size_t kDims>
torch::stable::Tensor empty(torch::headeronly::ScalarType dtype, const int64_t (&size)[kDims],
                            const int64_t (&stride)[kDims]) {
  using torch::stable::detail::from, torch::stable::detail::to;
  constexpr int32_t kCpu = 0;
  AtenTensorHandle made;
  const auto error =
      aoti_torch_empty_strided(kDims, size, stride, to<int32_t>(from(dtype)), kCpu, 0, &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "memdense: could not allocate a tensor");
  return torch::stable::Tensor(made);
}

// Contiguous.
template <size_t kDims>
torch::stable::Tensor empty(torch::headeronly::ScalarType dtype, const int64_t (&size)[kDims]) {
  int64_t stride[kDims], step = 1;
  for (size_t i = kDims; i-- > 0; step *= std::max<int64_t>(size[i], 1)) stride[i] = step;
  return empty(dtype, size, stride);
}

}  // namespace memdense
