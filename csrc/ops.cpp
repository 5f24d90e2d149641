// Every operation's schema. Kernels are registered beside their code, in cpu/ and cuda/.
//
// Matrices are [M, C] with unit column stride and any row stride, vectors [C].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(memdense, m) {
  // Of the widest registers that the CPU's kernels use; 1024 are AMX's tiles.
  m.def("register_bytes() -> int");

  m.def("channel_statistics(Tensor x) -> (Tensor mean, Tensor var)");
  m.def("pack(Tensor x, Tensor(a!) out) -> (Tensor mean, Tensor var)");

  // A BatchNorm is mean, var, gamma, beta and eps, in x's dtype; sums (2, C) are S1 and S2, to
  // which a backward adds its reader's share. Without `add` g holds nothing yet.
  m.def(
      "bn_relu_conv1x1(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
      " Tensor weight, Tensor(a!)? moments) -> Tensor");
  // y... are of the norm behind: y without batch statistics, all without a norm are missing
  m.def(
      "bn_relu_conv1x1_backward(Tensor dz, Tensor? y, Tensor? y_mean, Tensor? y_var,"
      " Tensor? y_gamma, float y_eps, Tensor? y_dbeta, Tensor? y_dgamma, Tensor weight, Tensor x,"
      " Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) g, bool add,"
      " Tensor(b!)? sums, bool need_weight) -> (Tensor dbeta, Tensor dgamma, Tensor dweight)");
  m.def(
      "bn_relu_pool_conv1x1(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta,"
      " float eps, Tensor weight, int n, int h, int w) -> Tensor");
  m.def(
      "bn_relu_pool_conv1x1_backward(Tensor dout, Tensor weight, Tensor x, Tensor mean, Tensor var,"
      " Tensor? gamma, Tensor? beta, float eps, Tensor(a!) g, bool add, Tensor(b!)? sums, int n,"
      " int h, int w, bool need_weight) -> (Tensor dbeta, Tensor dgamma, Tensor dweight)");

  m.def(
      "settle(Tensor g, Tensor x, Tensor? sums, Tensor? mean, Tensor? keep, float factor)"
      " -> Tensor");
  m.def(
      "bn_relu(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
      " bool relu) -> Tensor");
  m.def(
      "bn_relu_backward(Tensor dout, Tensor x, Tensor mean, Tensor var, Tensor? gamma,"
      " Tensor? beta, float eps, bool relu, Tensor(a!) g, bool add, Tensor(b!)? sums)"
      " -> (Tensor dbeta, Tensor dgamma)");
  m.def(
      "bn_relu_mean(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
      " int images) -> Tensor");
  m.def(
      "bn_relu_mean_backward(Tensor dout, Tensor x, Tensor mean, Tensor var, Tensor? gamma,"
      " Tensor? beta, float eps, Tensor(a!) g, bool add, Tensor(b!)? sums)"
      " -> (Tensor dbeta, Tensor dgamma)");

  m.def(
      "bn_relu_maxpool(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps,"
      " int n, int h, int w) -> (Tensor out, Tensor winner)");
  m.def(
      "bn_relu_maxpool_sums(Tensor dout, Tensor winner, Tensor x, Tensor mean, Tensor var,"
      " Tensor? gamma, Tensor? beta, float eps, int n, int h, int w)"
      " -> (Tensor dbeta, Tensor dgamma)");
  // out may be x
  m.def(
      "bn_relu_maxpool_backward(Tensor dout, Tensor winner, Tensor x, Tensor mean, Tensor var,"
      " Tensor? gamma, Tensor? beta, float eps, Tensor dbeta, Tensor dgamma, bool batch, int n,"
      " int h, int w, Tensor(a!) out) -> ()");

  // Images x, dy, out, dx are [N, C, H, W] with any strides, weight is [k, C, 3, 3].
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor(a!) out, bool tf32=False) -> ()");
  m.def(
      "conv3x3_input_gradient(Tensor dy, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor(a!) dx, bool tf32=False) -> ()");
  m.def(
      "conv3x3_weight_gradient(Tensor dy, Tensor x, int[2] stride, int[2] padding, "
      "int[2] dilation, bool tf32=False) -> Tensor");

  // A dense layer's second half on n images of h by w pixels: y, out, keep, dy, dz are matrices.
  m.def(
      "bn_relu_conv3x3(Tensor y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor weight, int[2] dilation, int n, int h, int w, Tensor? keep, float factor, "
      "Tensor(a!) out, Tensor(b!)? moments, bool tf32=False) -> ()");
  m.def(
      "bn_relu_conv3x3_backward(Tensor dy, Tensor weight, int[2] dilation, Tensor y, Tensor mean, "
      "Tensor var, Tensor? gamma, Tensor? beta, float eps, int n, int h, int w, Tensor(a!) dz, "
      "Tensor(b!) dbeta, Tensor(c!) dgamma, Tensor(d!)? dweight, bool accumulate=False, "
      "bool tf32=False) -> ()");
  // Bytes of tensors that the CPU's kernels take beside their results, in float32 or bfloat16.
  m.def(
      "conv1x1_scratch(int rows, int channels, int outputs, int threads, bool bfloat16, "
      "bool backward) -> int");
  m.def(
      "conv3x3_scratch(int n, int h, int w, int c, int k, int[2] dilation, int threads, "
      "bool bfloat16, bool backward) -> int");
}
