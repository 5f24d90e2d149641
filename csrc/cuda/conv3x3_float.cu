#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

void convolve_tf32(const Convolution& a, Mode mode, int columns, Grid grid, Stream stream) {
  launch_convolution<Tf32Kind>(a, mode, columns, grid, stream);
}

void convolve_float(const Convolution& a, Mode mode, int columns, Grid grid, Stream stream) {
  launch_convolution<FloatKind>(a, mode, columns, grid, stream);
}

void weight_gradient_tf32(const WeightGradient& a, int columns, Grid grid, Stream stream) {
  launch_weight_gradient<Tf32Kind>(a, columns, grid, stream);
}

void weight_gradient_float(const WeightGradient& a, int columns, Grid grid, Stream stream) {
  launch_weight_gradient<FloatKind>(a, columns, grid, stream);
}

}  // namespace memdense::conv3x3
