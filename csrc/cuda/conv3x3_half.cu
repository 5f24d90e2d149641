#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

template void launch_convolution<HalfKind>(const Convolution&, Mode, int, Grid, Stream);
template void launch_weight_gradient<HalfKind>(const WeightGradient&, int, Grid, Stream);

}  // namespace memdense::conv3x3
