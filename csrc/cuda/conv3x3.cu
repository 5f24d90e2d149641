// The dilated 3x3 convolution on CUDA: what the operations accept, and the launches they are.
//
// Everything runs on the current stream of the tensors' device, without synchronisation; scratch
// comes from PyTorch's allocator. So the operations can be captured in CUDA graphs. Those of a
// dense layer do nothing but launch, so that a replay of their launches (launches.h) is as good as
// a call.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>

#include "../conv3x3_arguments.h"
#include "conv3x3_plan.h"

namespace memdense::conv3x3 {
namespace {

// A tensor's device, current while this lives, with its current stream.
class Place {
 public:
#ifdef __CUDACC__
  explicit Place(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    const auto found = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
    STD_TORCH_CHECK(found == AOTI_TORCH_SUCCESS, "conv3x3: found no current CUDA stream");
    stream_ = static_cast<device::Stream>(stream);
    properties_ = device::properties(tensor.get_device_index());
  }
#else
  explicit Place(const Tensor&) : stream_{}, properties_(device::properties(0)) {}
#endif
  device::Stream stream() const { return stream_; }
  const device::Properties& properties() const { return properties_; }

 private:
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  device::Stream stream_;
  device::Properties properties_;
};

// How values are stored and multiplied.
enum class Kind { kHalf, kBFloat16, kTf32, kFloat };

// ---- what the operations accept

void expect_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "conv3x3: expected ", name,
                  " on the device of the others");
}

void expect(const char* name, const Tensor& tensor, const Tensor& like) {
  expect_dtype(name, tensor, like.scalar_type());
  expect_device(name, tensor, like);
}

void expect_vector(const char* name, const Tensor& tensor, int64_t size, const Tensor& like) {
  expect_device(name, tensor, like);
  memdense::expect_vector(name, tensor, size);
}

Kind kind_of(const Tensor& tensor, bool tf32) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Kind::kHalf;
    case ScalarType::BFloat16:
      return Kind::kBFloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "conv3x3: expected float16, bfloat16 or float32 images, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
      return tf32 ? Kind::kTf32 : Kind::kFloat;
  }
}

int value_bytes(Kind kind) { return kind == Kind::kHalf || kind == Kind::kBFloat16 ? 2 : 4; }

void expect_weight(const Tensor& weight, const Geometry& g, const Tensor& like) {
  expect_device("weight", weight, like);
  conv3x3::expect_weight(weight, g, like.scalar_type());
}

// Output pixels as the rows, reading x.
Axis forward_axis(const Geometry& p, int a) {
  return axis(p.out[a], p.in[a], p.stride[a], 1, p.dilation[a], -p.padding[a]);
}

// Pixels of x as the rows, reading the output's gradient with the taps in reverse order.
Axis backward_axis(const Geometry& p, int a) {
  return axis(p.in[a], p.out[a], 1, p.stride[a], p.dilation[a], p.padding[a] - 2 * p.dilation[a]);
}

// ---- how tensors are handed over

// Whether 16-byte accesses at these multiples of values are aligned.
bool aligned(const void* data, std::initializer_list<int64_t> strides, int bytes) {
  bool good = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) good = good && stride * bytes % 16 == 0;
  return good;
}

struct Images {
  const void* data;
  Strides strides;
  bool vectors;
};

Images of_images(const Tensor& x, int bytes) {
  const void* data = x.const_data_ptr();
  const Strides s{x.stride(0), x.stride(2), x.stride(3), x.size(1) == 1 ? 1 : x.stride(1)};
  return {data, s,
          s.c == 1 && x.size(1) * bytes % 16 == 0 && aligned(data, {s.n, s.h, s.w}, bytes)};
}

Images of_matrix(const Tensor& x, const Geometry& p, const int64_t (&size)[2], int bytes) {
  const void* data = x.const_data_ptr();
  const int64_t row = p.n * size[0] * size[1] == 1 ? 0 : x.stride(0);
  return {data,
          {size[0] * size[1] * row, size[1] * row, row, 1},
          x.size(1) * bytes % 16 == 0 && aligned(data, {row}, bytes)};
}

void set_source(Convolution& a, const Images& images, int64_t channels) {
  a.source = images.data;
  a.source_strides = images.strides;
  a.source_vectors = images.vectors;
  a.channels = static_cast<int>(channels);
}

void set_target(Convolution& a, const Tensor& matrix, const Geometry& p, const int64_t (&size)[2],
                int bytes) {
  expect_apart("what is written", matrix);
  a.target = matrix.mutable_data_ptr();
  a.target_row = matrix.stride(0);
  a.target_column = 1;
  a.target_vectors = aligned(a.target, {a.target_row}, bytes);
  a.place = {size[0] * size[1], size[1], 1, 1};
}

void set_target_images(Convolution& a, const Tensor& images, int bytes) {
  expect_apart("what is written", images);
  const Images target = of_images(images, bytes);
  a.target = images.mutable_data_ptr();
  a.place = target.strides;
  a.target_row = 1;
  a.target_column = target.strides.c;
  a.target_vectors =
      a.target_column == 1 &&
      aligned(a.target, {target.strides.n, target.strides.h, target.strides.w}, bytes);
}

// `transposed`: C is the columns, and the taps come in reverse order.
void set_weight(Convolution& a, const Tensor& weight, bool transposed, int bytes) {
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  int64_t taps[2] = {weight.stride(2), weight.stride(3)};
  if (transposed) {
    data += 2 * (taps[0] + taps[1]) * bytes;
    for (int64_t& tap : taps) tap = -tap;
  }
  const int columns = transposed ? 1 : 0, channels = transposed ? 0 : 1;
  a.weight = data;
  a.columns = static_cast<int>(weight.size(columns));
  a.weight_column = weight.stride(columns);
  a.weight_channel = weight.size(channels) == 1 ? 1 : weight.stride(channels);
  a.weight_tap[0] = taps[0];
  a.weight_tap[1] = taps[1];
  a.weight_vectors = a.weight_channel == 1 && weight.size(channels) * bytes % 16 == 0 &&
                     aligned(data, {a.weight_column, taps[0], taps[1]}, bytes);
  a.columns_inner = a.weight_column < a.weight_channel;
  a.taps_inner = std::abs(taps[1]) < std::min(a.weight_column, a.weight_channel);
}

Norm norm_of(const Tensor& x, const Tensor& mean, const Tensor& var, const MaybeTensor& gamma,
             const MaybeTensor& beta, double eps) {
  const int64_t channels = x.size(1);
  Norm norm{};
  for (const auto& [name, tensor] : {std::pair{"mean", &mean}, {"var", &var}}) {
    expect_vector(name, *tensor, channels, x);
    expect_dtype(name, *tensor, ScalarType::Float);
  }
  norm.mean = static_cast<const float*>(mean.const_data_ptr());
  norm.var = static_cast<const float*>(var.const_data_ptr());
  const auto take = [&](const char* name, const MaybeTensor& tensor, const void*& to,
                        bool& is_float) {
    if (!tensor) return;
    expect_vector(name, *tensor, channels, x);
    is_float = tensor->scalar_type() == ScalarType::Float;
    if (!is_float) expect_dtype(name, *tensor, x.scalar_type());
    to = tensor->const_data_ptr();
  };
  take("gamma", gamma, norm.gamma, norm.gamma_float);
  take("beta", beta, norm.beta, norm.beta_float);
  norm.eps = static_cast<float>(eps);
  return norm;
}

Tensor scratch(int64_t values, const Tensor& like) {
  values = std::max<int64_t>(values, 1);
  const Tensor tensor =
      torch::stable::empty({values}, ScalarType::Float, std::nullopt, like.device());
  device::record_scratch(tensor.const_data_ptr(), values * sizeof(float));
  return tensor;
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// ---- launches

// The convolution of a's tensors, which `a` describes but for its walk; returns how many partial
// results it leaves.
template <typename Scratch>
int convolve(Kind kind, Mode mode, Convolution& a, const Geometry& p, bool backward,
             const Place& place, const Scratch& partials) {
  const auto axis_of = backward ? backward_axis : forward_axis;
  const ConvolutionPlan plan =
      plan_convolution(p.n, axis_of(p, 0), axis_of(p, 1), a.channels, a.columns, value_bytes(kind),
                       kind != Kind::kFloat, mode, place.properties());
  a.walk = plan.walk;
  a.resident = plan.resident;
  a.teams = plan.teams;
  const int walkers = plan.teams * plan.grid.x;
  a.partials = partials(walkers);
  const auto launcher = kind == Kind::kHalf       ? launch_convolution<HalfKind>
                        : kind == Kind::kBFloat16 ? launch_convolution<BFloat16Kind>
                        : kind == Kind::kTf32     ? launch_convolution<Tf32Kind>
                                                  : launch_convolution<FloatKind>;
  launcher(a, mode, plan.columns, plan.grid, place.stream());
  return walkers;
}

float* no_partials(int) { return nullptr; }

// dW's partials of x, through a BatchNorm where the norm has a mean; sets how many there are.
Tensor weight_partials(Kind kind, const Geometry& p, const Images& x, const Images& dy,
                       const Norm& norm, const Tensor& like, const Place& place, int& splits) {
  const WeightPlan plan =
      plan_weight_gradient(p.n, forward_axis(p, 0), forward_axis(p, 1), static_cast<int>(p.c),
                           static_cast<int>(p.k), value_bytes(kind), place.properties());
  splits = plan.grid.x;
  const Tensor partials = scratch(splits * kTaps * p.k * p.c, like);
  const WeightGradient a{plan.walk,  x.data,      x.strides,  static_cast<int>(p.c),
                         x.vectors,  dy.data,     dy.strides, static_cast<int>(p.k),
                         dy.vectors, plan.chunks, norm,       floats(partials)};
  const auto launcher = kind == Kind::kHalf       ? launch_weight_gradient<HalfKind>
                        : kind == Kind::kBFloat16 ? launch_weight_gradient<BFloat16Kind>
                        : kind == Kind::kTf32     ? launch_weight_gradient<Tf32Kind>
                                                  : launch_weight_gradient<FloatKind>;
  launcher(a, plan.columns, plan.grid, place.stream());
  return partials;
}

// ---- the plain operations

void conv3x3(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Ints& stride,
             const Ints& padding, const Ints& dilation, const Tensor& out, bool tf32) {
  const Kind kind = kind_of(x, tf32);
  const int bytes = value_bytes(kind);
  const Geometry p = geometry(x, out, stride, padding, dilation);
  expect_weight(weight, p, x);
  expect("out", out, x);
  if (bias) {
    expect("bias", *bias, x);
    expect_vector("bias", *bias, p.k, x);
  }
  const Place place(x);
  if (p.n == 0) return;
  Convolution a{};
  set_source(a, of_images(x, bytes), p.c);
  set_weight(a, weight, false, bytes);
  set_target_images(a, out, bytes);
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  convolve(kind, Mode::kPlain, a, p, false, place, no_partials);
}

void conv3x3_input_gradient(const Tensor& dy, const Tensor& weight, const Ints& stride,
                            const Ints& padding, const Ints& dilation, const Tensor& dx,
                            bool tf32) {
  const Kind kind = kind_of(dy, tf32);
  const int bytes = value_bytes(kind);
  const Geometry p = geometry(dx, dy, stride, padding, dilation);
  expect_weight(weight, p, dy);
  expect("dx", dx, dy);
  const Place place(dy);
  if (p.n == 0) return;
  Convolution a{};
  set_source(a, of_images(dy, bytes), p.k);
  set_weight(a, weight, true, bytes);
  set_target_images(a, dx, bytes);
  convolve(kind, Mode::kPlain, a, p, true, place, no_partials);
}

Tensor conv3x3_weight_gradient(const Tensor& dy, const Tensor& x, const Ints& stride,
                               const Ints& padding, const Ints& dilation, bool tf32) {
  const Kind kind = kind_of(x, tf32);
  const int bytes = value_bytes(kind);
  const Geometry p = geometry(x, dy, stride, padding, dilation);
  expect("dy", dy, x);
  STD_TORCH_CHECK(p.k >= 1 && p.c >= 1, "conv3x3: expected channels");
  const Place place(x);
  const Tensor dweight =
      torch::stable::empty({p.k, p.c, 3, 3}, ScalarType::Float, std::nullopt, x.device());
  Reduction reduction{};
  Tensor partials;
  if (p.n > 0) {
    partials = weight_partials(kind, p, of_images(x, bytes), of_images(dy, bytes), Norm{}, x, place,
                               reduction.splits);
    reduction.weight_partials = floats(partials);
  }
  reduction.columns = static_cast<int>(p.k);
  reduction.channels = static_cast<int>(p.c);
  reduction.dweight = floats(dweight);
  reduce_partials(reduction, place.stream());
  return dweight;
}

// ---- a dense layer's second half

void bn_relu_conv3x3(const Tensor& y, const Tensor& mean, const Tensor& var,
                     const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                     const Tensor& weight, const Ints& dilation, int64_t n, int64_t h, int64_t w,
                     const MaybeTensor& keep, double factor, const Tensor& out,
                     const MaybeTensor& moments, bool tf32) {
  const Kind kind = kind_of(y, tf32);
  const int bytes = value_bytes(kind);
  const Geometry p = geometry(n, h, w, y, out, dilation);
  expect_matrix("y", y, y.size(0), p.c);
  expect_weight(weight, p, y);
  expect("out", out, y);
  expect_matrix("out", out, y.size(0), p.k);
  Convolution a{};
  a.norm = norm_of(y, mean, var, gamma, beta, eps);
  a.factor = static_cast<float>(factor);
  a.statistics = moments.has_value();
  if (keep) {
    expect_dtype("keep", *keep, ScalarType::Bool);
    expect_device("keep", *keep, y);
    expect_matrix("keep", *keep, y.size(0), p.k);
    a.keep = static_cast<const uint8_t*>(keep->const_data_ptr());
    a.keep_row = keep->stride(0);
  }
  if (a.statistics) {
    expect_dtype("moments", *moments, ScalarType::Float);
    expect_device("moments", *moments, y);
    expect_matrix("moments", *moments, 2, p.k);
    expect_apart("moments", *moments);
  }
  const Place place(y);
  set_source(a, of_matrix(y, p, p.in, bytes), p.c);
  set_weight(a, weight, false, bytes);
  set_target(a, out, p, p.out, bytes);
  Tensor partials;
  const int walkers =
      convolve(kind, Mode::kForward, a, p, false, place, [&](int walkers) -> float* {
        if (!a.statistics) return nullptr;
        partials = scratch(walkers * (2 * p.k + 1), y);
        return floats(partials);
      });
  if (a.statistics) {
    float* mean_out = floats(*moments);
    merge_moments(Merge{a.partials, a.columns, walkers, mean_out, mean_out + moments->stride(0)},
                  place.stream());
  }
}

void bn_relu_conv3x3_backward(const Tensor& dy, const Tensor& weight, const Ints& dilation,
                              const Tensor& y, const Tensor& mean, const Tensor& var,
                              const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                              int64_t n, int64_t h, int64_t w, const Tensor& dz,
                              const Tensor& dbeta, const Tensor& dgamma, const MaybeTensor& dweight,
                              bool accumulate, bool tf32) {
  STD_TORCH_CHECK(!accumulate, "conv3x3: on CUDA, dz is written, not accumulated");
  const Kind kind = kind_of(y, tf32);
  const int bytes = value_bytes(kind);
  const Geometry p = geometry(n, h, w, y, dy, dilation);
  expect_matrix("y", y, y.size(0), p.c);
  expect("dy", dy, y);
  expect_matrix("dy", dy, y.size(0), p.k);
  expect_weight(weight, p, y);
  expect("dz", dz, y);
  expect_matrix("dz", dz, y.size(0), p.c);
  for (const auto& [name, tensor] : {std::pair{"dbeta", &dbeta}, {"dgamma", &dgamma}}) {
    expect_dtype(name, *tensor, ScalarType::Float);
    expect_vector(name, *tensor, p.c, y);
  }
  if (dweight) {
    expect_device("dweight", *dweight, y);
    expect_weight_gradient(*dweight, p, ScalarType::Float);
  }
  const Norm norm = norm_of(y, mean, var, gamma, beta, eps);
  const Place place(y);
  const Images gradient = of_matrix(dy, p, p.out, bytes);
  const Images input = of_matrix(y, p, p.in, bytes);
  Convolution a{};
  a.norm = norm;
  set_source(a, gradient, p.k);
  set_weight(a, weight, true, bytes);
  set_target(a, dz, p, p.in, bytes);
  a.y = input.data;
  a.y_row = input.strides.w;
  a.y_vectors = aligned(input.data, {input.strides.w}, bytes);
  Tensor sums, partials;
  Reduction reduction{};
  reduction.walkers =
      convolve(kind, Mode::kGradient, a, p, true, place, [&](int walkers) -> float* {
        sums = scratch(2 * p.c * walkers, y);
        return floats(sums);
      });
  reduction.sums = a.partials;
  if (dweight) {
    partials = weight_partials(kind, p, input, gradient, norm, y, place, reduction.splits);
    reduction.weight_partials = floats(partials);
    reduction.dweight = floats(*dweight);
  }
  reduction.columns = static_cast<int>(p.k);
  reduction.channels = static_cast<int>(p.c);
  reduction.var = norm.var;
  reduction.eps = norm.eps;
  reduction.dbeta = floats(dbeta);
  reduction.dgamma = floats(dgamma);
  reduce_partials(reduction, place.stream());
}

}  // namespace
}  // namespace memdense::conv3x3

STABLE_TORCH_LIBRARY_IMPL(memdense, MEMDENSE_DISPATCH, m) {
  namespace ops = memdense::conv3x3;
  m.impl("conv3x3", TORCH_BOX(&ops::conv3x3));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&ops::conv3x3_input_gradient));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&ops::conv3x3_weight_gradient));
  m.impl("bn_relu_conv3x3", TORCH_BOX(&ops::bn_relu_conv3x3));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&ops::bn_relu_conv3x3_backward));
}
