// What the 3x3 convolution's operations accept, on the CPU and on CUDA, but for the device.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "conv3x3_geometry.h"

namespace memdense {
namespace conv3x3 {

using Ints = std::vector<int64_t>;

// Sums of products of smaller numbers with sizes fit into 64 bits.
constexpr int64_t kLimit = int64_t{1} << 31;

// CUDA counts the bytes of so many channels in 32 bits.
constexpr int64_t kMaxChannels = int64_t{1} << 27;

inline void expect_channels(int64_t c, int64_t k) {
  STD_TORCH_CHECK(std::max(c, k) <= kMaxChannels, "conv3x3: expected at most ", kMaxChannels,
                  " channels, got ", c, " and ", k);
}

inline void expect_pairs(const Ints& stride, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "conv3x3: expected stride, padding and dilation of two numbers");
  for (int a = 0; a < 2; ++a) {
    STD_TORCH_CHECK(stride[a] >= 1 && padding[a] >= 0 && dilation[a] >= 1,
                    "conv3x3: expected stride >= 1, padding >= 0 and dilation >= 1, got ",
                    stride[a], ", ", padding[a], " and ", dilation[a]);
    STD_TORCH_CHECK(std::max({stride[a], padding[a], dilation[a]}) < kLimit,
                    "conv3x3: expected stride, padding and dilation below 2^31, got ", stride[a],
                    ", ", padding[a], " and ", dilation[a]);
  }
}

inline Geometry geometry(const Tensor& images, const Tensor& outputs, const Ints& stride,
                         const Ints& padding, const Ints& dilation) {
  expect_pairs(stride, padding, dilation);
  STD_TORCH_CHECK(images.dim() == 4 && outputs.dim() == 4, "conv3x3: expected 4-D images, got ",
                  images.dim(), "-D and ", outputs.dim(), "-D");
  Geometry g{images.size(0), images.size(1), outputs.size(1), {}, {}, {}, {}, {}};
  STD_TORCH_CHECK(outputs.size(0) == g.n, "conv3x3: expected ", g.n, " outputs, got ",
                  outputs.size(0));
  expect_channels(g.c, g.k);
  for (int a = 0; a < 2; ++a) {
    g.in[a] = images.size(2 + a);
    g.out[a] = outputs.size(2 + a);
    g.stride[a] = stride[a];
    g.padding[a] = padding[a];
    g.dilation[a] = dilation[a];
    const int64_t room = g.in[a] + 2 * g.padding[a] - 2 * g.dilation[a] - 1;
    const int64_t size = room < 0 ? 0 : room / g.stride[a] + 1;
    STD_TORCH_CHECK(size >= 1 && g.in[a] >= 1, "conv3x3: the image, ", g.in[a],
                    " long with padding ", g.padding[a],
                    ", is smaller than the kernel with dilation ", g.dilation[a]);
    STD_TORCH_CHECK(g.out[a] == size, "conv3x3: expected an output ", size, " long, got ",
                    g.out[a]);
  }
  return g;
}

// Stride 1 and as much padding as keeps the size.
inline Geometry geometry(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k,
                         const Ints& dilation) {
  STD_TORCH_CHECK(dilation.size() == 2, "conv3x3: expected a dilation of two numbers");
  STD_TORCH_CHECK(dilation[0] >= 1 && dilation[1] >= 1, "conv3x3: expected dilation >= 1, got ",
                  dilation[0], " and ", dilation[1]);
  STD_TORCH_CHECK(std::max(dilation[0], dilation[1]) < kLimit,
                  "conv3x3: expected dilation below 2^31, got ", dilation[0], " and ", dilation[1]);
  expect_channels(c, k);
  const int64_t d[2] = {dilation[0], dilation[1]};
  return {n, c, k, {h, w}, {h, w}, {1, 1}, {d[0], d[1]}, {d[0], d[1]}};
}

// The same on matrices whose rows are n images' pixels.
inline Geometry geometry(int64_t n, int64_t h, int64_t w, const Tensor& y, const Tensor& out,
                         const Ints& dilation) {
  STD_TORCH_CHECK(y.dim() == 2 && out.dim() == 2, "conv3x3: expected matrices, got ", y.dim(),
                  "-D and ", out.dim(), "-D");
  const int64_t rows = y.size(0);
  STD_TORCH_CHECK(are_images(rows, n, h, w), "conv3x3: ", n, " images of ", h, " by ", w,
                  " pixels are not ", rows, " rows");
  return geometry(n, h, w, y.size(1), out.size(1), dilation);
}

inline void expect_weight(const Tensor& weight, const Geometry& g, ScalarType dtype) {
  expect_dtype("weight", weight, dtype);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == g.k && weight.size(1) == g.c &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3: expected weight of shape (", g.k, ", ", g.c, ", 3, 3), got ",
                  shape(weight));
  STD_TORCH_CHECK(g.k >= 1 && g.c >= 1, "conv3x3: expected channels");
}

inline void expect_weight_gradient(const Tensor& dweight, const Geometry& g, ScalarType dtype) {
  expect_dtype("dweight", dweight, dtype);
  STD_TORCH_CHECK(dweight.dim() == 4 && dweight.size(0) == g.k && dweight.size(1) == g.c &&
                      dweight.size(2) == 3 && dweight.size(3) == 3 && dweight.is_contiguous(),
                  "conv3x3: expected dweight to be contiguous, of the weight's shape, got ",
                  described(dweight));
}

}  // namespace conv3x3
}  // namespace memdense
