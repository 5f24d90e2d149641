// The plain convolution's operations on the CPU (conv3x3.cpp), as ops.cpp declares them.
#pragma once

#include "../conv3x3_arguments.h"

namespace memdense {
namespace conv3x3 {

void conv3x3(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Ints& stride,
             const Ints& padding, const Ints& dilation, const Tensor& out, bool tf32);

void conv3x3_input_gradient(const Tensor& dy, const Tensor& weight, const Ints& stride,
                            const Ints& padding, const Ints& dilation, const Tensor& dx, bool tf32);

Tensor conv3x3_weight_gradient(const Tensor& dy, const Tensor& x, const Ints& stride,
                               const Ints& padding, const Ints& dilation, bool tf32);

}  // namespace conv3x3
}  // namespace memdense
