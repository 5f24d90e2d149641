#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

void convolve_half(const Convolution& a, Mode mode, int columns, Grid grid, Stream stream) {
  launch_convolution<HalfKind>(a, mode, columns, grid, stream);
}

void weight_gradient_half(const WeightGradient& a, int columns, Grid grid, Stream stream) {
  launch_weight_gradient<HalfKind>(a, columns, grid, stream);
}

}  // namespace memdense::conv3x3
