// The shape of a dilated 3x3 convolution, on the CPU and on CUDA.
#pragma once

#include <cstdint>

namespace memdense {
namespace conv3x3 {

struct Geometry {
  int64_t n, c, k;        // images, input channels, output channels
  int64_t in[2], out[2];  // height and width
  int64_t stride[2], padding[2], dilation[2];
};

}  // namespace conv3x3
}  // namespace memdense
