#include "conv3x3_kernels.h"

namespace memdense::conv3x3 {

template void launch_convolution<BFloat16Kind>(const Convolution&, Mode, int, Grid, Stream);
template void launch_weight_gradient<BFloat16Kind>(const WeightGradient&, int, Grid, Stream);

}  // namespace memdense::conv3x3
