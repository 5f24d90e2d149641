// Our 3x3 convolution behind aten::convolution_overrideable, PyTorch's name for the convolution of
// a backend that brings its own; on the CPU nothing else is behind it. PyTorch differentiates it in
// C++, twice too: for small images the way through Python takes longer than the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <array>
#include <tuple>
#include <vector>

#include "conv3x3_operations.h"
#include "memory.h"

namespace memdense {
namespace conv3x3 {
namespace {

using torch::headeronly::MemoryFormat;

// Which format images have; where both would do, what PyTorch says.
MemoryFormat format(const Tensor& images) {
  int64_t least = 0;
  for (const int a : {1, 3, 2, 0}) {
    const int64_t size = images.size(a), stride = images.stride(a);
    const bool last = size > 0 && stride >= least && images.stride(1) > 0 &&
                      !(a == 0 && least == images.stride(1));
    if (!last) return MemoryFormat::Contiguous;
    least = stride * (size > 1 ? size : 1);
  }
  return MemoryFormat::ChannelsLast;
}

Tensor empty(const int64_t (&size)[4], const Tensor& like, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return memdense::empty(like.scalar_type(), size);
  const auto [n, c, h, w] = size;
  return memdense::empty(like.scalar_type(), size, {c * h * w, 1, c * w, c});
}

void expect_plain(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                  const Ints& dilation, bool transposed, int64_t groups) {
  STD_TORCH_CHECK(!transposed && groups == 1,
                  "dilated_conv3x3: expected a convolution of one group, not transposed");
  expect_pairs(stride, padding, dilation);
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "dilated_conv3x3: expected images (N, C, H, W) and weight (k, C, 3, 3), got ",
                  shape(x), " and ", shape(weight));
  STD_TORCH_CHECK(x.size(1) == weight.size(1), "dilated_conv3x3: expected images with ",
                  weight.size(1), " channels, got ", x.size(1));
}

// Of the output along one axis.
int64_t length(int64_t size, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - 2 * dilation - 1;
  STD_TORCH_CHECK(room >= 0, "dilated_conv3x3: an image ", size, " long with padding ", padding,
                  " is smaller than the kernel with dilation ", dilation, ", which is ",
                  2 * dilation + 1, " long");
  return room / stride + 1;
}

Tensor convolution(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const Ints& stride, const Ints& padding, const Ints& dilation, bool transposed,
                   const Ints&, int64_t groups) {
  expect_plain(x, weight, stride, padding, dilation, transposed, groups);
  const Tensor out =
      empty({x.size(0), weight.size(0), length(x.size(2), stride[0], padding[0], dilation[0]),
             length(x.size(3), stride[1], padding[1], dilation[1])},
            x, format(x));
  conv3x3(x, weight, bias, stride, padding, dilation, out, false);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& dy, const Tensor& x,
                                                        const Tensor& weight, const Ints& stride,
                                                        const Ints& padding, const Ints& dilation,
                                                        bool transposed, const Ints&,
                                                        int64_t groups,
                                                        const std::vector<bool>& need) {
  expect_plain(x, weight, stride, padding, dilation, transposed, groups);
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(1) == weight.size(0),
                  "dilated_conv3x3: expected gradients with ", weight.size(0), " channels, got ",
                  shape(dy));
  Tensor dx, dweight, dbias;
  if (need[0]) {
    dx = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x, format(x));
    conv3x3_input_gradient(dy, weight, stride, padding, dilation, dx, false);
  }
  if (need[1]) {
    dweight = conv3x3_weight_gradient(dy, x, stride, padding, dilation, false);
    if (dweight.scalar_type() != weight.scalar_type()) {
      dweight = torch::stable::to(dweight, weight.scalar_type());
    }
  }
  if (need[2]) dbias = torch::stable::sum(dy, std::array<int64_t, 3>{0, 2, 3});
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace conv3x3
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("convolution_overrideable", TORCH_BOX(&memdense::conv3x3::convolution));
  m.impl("convolution_backward_overrideable", TORCH_BOX(&memdense::conv3x3::convolution_backward));
}
