#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

void convolve_bfloat16(const Convolution& a, Mode mode, int columns, Grid grid, Stream stream) {
  launch_convolution<BFloat16Kind>(a, mode, columns, grid, stream);
}

void weight_gradient_bfloat16(const WeightGradient& a, int columns, Grid grid, Stream stream) {
  launch_weight_gradient<BFloat16Kind>(a, columns, grid, stream);
}

}  // namespace memdense::conv3x3
