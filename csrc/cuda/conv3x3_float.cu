#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

template void launch_convolution<Tf32Kind>(const Convolution&, Mode, int, Grid, Stream);
template void launch_weight_gradient<Tf32Kind>(const WeightGradient&, int, Grid, Stream);
template void launch_convolution<FloatKind>(const Convolution&, Mode, int, Grid, Stream);
template void launch_weight_gradient<FloatKind>(const WeightGradient&, int, Grid, Stream);

}  // namespace memdense::conv3x3
