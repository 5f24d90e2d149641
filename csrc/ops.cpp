// Every operation's schema. Kernels are registered beside their code, in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(memdense, m) {
  m.def("channel_statistics(Tensor x) -> (Tensor mean, Tensor var)");

  // Images x, dy, out, mask are [N, C, H, W] with any strides, weight is [k, C, 3, 3], vectors [C].
  m.def(
      "conv3x3(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor? bias, int[2] stride, "
      "int[2] padding, int[2] dilation, Tensor? mask, float factor, Tensor(a!) out, "
      "bool statistics) -> (Tensor mean, Tensor var)");
  m.def(
      "conv3x3_input_gradient(Tensor dy, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor? x, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? rstd, "
      "Tensor(a!) dx, bool accumulate) -> Tensor");
  m.def(
      "conv3x3_weight_gradient(Tensor dy, Tensor x, Tensor? scale, Tensor? shift, int[2] stride, "
      "int[2] padding, int[2] dilation) -> Tensor");
}
