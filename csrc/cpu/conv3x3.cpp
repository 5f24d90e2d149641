// The dilated 3x3 convolution on the CPU: operations around the kernels of conv3x3.h.
//
// Tasks own a fixed share of the bands and their own scratch, sums and partial gradients; what they
// leave is merged in their order, so the same number of threads gives the same bits.
#include "conv3x3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

namespace memdense {
namespace conv3x3 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// float for bfloat16
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// ---- what the operations accept

Geometry geometry(const Tensor& images, const Tensor& outputs, const Tensor& weight,
                  const Ints& stride, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(images.dim() == 4 && outputs.dim() == 4, "conv3x3: expected 4-D images, got ",
                  images.dim(), "-D and ", outputs.dim(), "-D");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3: expected weight of shape [k, C, 3, 3]");
  Geometry g{images.size(0), images.size(1), weight.size(0), {}, {}, {}, {}, {}};
  for (int a = 0; a < 2; ++a) {
    g.in[a] = images.size(2 + a);
    g.out[a] = outputs.size(2 + a);
    g.stride[a] = stride[a];
    g.padding[a] = padding[a];
    g.dilation[a] = dilation[a];
    STD_TORCH_CHECK(g.stride[a] >= 1 && g.padding[a] >= 0 && g.dilation[a] >= 1,
                    "conv3x3: expected stride >= 1, padding >= 0 and dilation >= 1, got ",
                    g.stride[a], ", ", g.padding[a], " and ", g.dilation[a]);
    const int64_t room = g.in[a] + 2 * g.padding[a] - 2 * g.dilation[a] - 1;
    const int64_t size = room < 0 ? 0 : room / g.stride[a] + 1;
    STD_TORCH_CHECK(size >= 1 && g.in[a] >= 1, "conv3x3: the image, ", g.in[a],
                    " long with padding ", g.padding[a],
                    ", is smaller than the kernel with dilation ", g.dilation[a]);
    STD_TORCH_CHECK(g.out[a] == size, "conv3x3: expected an output ", size, " long, got ",
                    g.out[a]);
  }
  STD_TORCH_CHECK(weight.size(1) == g.c && outputs.size(0) == g.n && outputs.size(1) == g.k,
                  "conv3x3: images [", g.n, ", ", g.c, ", ...], weight [", g.k, ", ",
                  weight.size(1), ", 3, 3] and output [", outputs.size(0), ", ", outputs.size(1),
                  ", ...] do not fit together");
  return g;
}

void expect_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "conv3x3: expected ", name, " in ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

template <typename T>
const T* vector(const char* name, const MaybeTensor& tensor, int64_t size) {
  if (!tensor) return nullptr;
  expect_dtype(name, *tensor, dtype_of<T>);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(),
                  "conv3x3: expected ", name, " to be a contiguous vector of ", size);
  return static_cast<const T*>(tensor->const_data_ptr());
}

template <typename T>
Reading<T> reading(const MaybeTensor& scale, const MaybeTensor& shift, int64_t channels) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                  "conv3x3: expected scale and shift, or neither");
  return {vector<T>("scale", scale, channels), vector<T>("shift", shift, channels)};
}

Strides strides(const Tensor& images) {
  return {images.stride(0), images.stride(1), images.stride(2), images.stride(3)};
}

template <typename S>
Images<const S> read_images(const Tensor& images) {
  return {static_cast<const S*>(images.const_data_ptr()), strides(images)};
}

template <typename S>
Images<S> write_images(const Tensor& images) {
  return {static_cast<S*>(images.mutable_data_ptr()), strides(images)};
}

// f(S{}) for the dtype's S
template <typename F>
auto dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16,
                  "conv3x3: expected float32, float64 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  return f(BFloat16{});
}

// ---- memory and threads of a call

template <typename T>
struct Scratch {
  Tensor tensor;
  T* data;

  explicit Scratch(int64_t values)
      : tensor(torch::stable::empty({std::max<int64_t>(values, 1)}, dtype_of<T>)),
        data(static_cast<T*>(tensor.mutable_data_ptr())) {}
};

int64_t aligned(int64_t values) { return (values + 15) / 16 * 16; }

int64_t task_count(int64_t lines) {
  return std::clamp<int64_t>(lines, 1, torch::stable::get_num_threads());
}

// f(task, begin, end) for each task's share of `count`
template <typename F>
void for_tasks(int64_t tasks, int64_t count, const F& f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) f(t, t * count / tasks, (t + 1) * count / tasks);
  });
}

// weight[tap, reduced, column] as the kernels want it; `transposed`: C is the columns
template <typename S, typename T>
Scratch<T> pack(const Tensor& weight, const Geometry& g, const Blocks<T>& blocks, bool transposed) {
  const int64_t reduced = transposed ? g.k : g.c;
  Scratch<T> packed(packed_values(reduced, blocks));
  const int64_t taps[2] = {weight.stride(2), weight.stride(3)};
  const S* data = static_cast<const S*>(weight.const_data_ptr());
  torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      pack_block(data, taps, weight.stride(transposed ? 0 : 1), weight.stride(transposed ? 1 : 0),
                 reduced, blocks, block, packed.data);
    }
  });
  return packed;
}

// ---- forward

template <typename S>
std::tuple<Tensor, Tensor> forward(const Geometry& g, const Tensor& x, const MaybeTensor& scale,
                                   const MaybeTensor& shift, const Tensor& weight,
                                   const MaybeTensor& bias, const MaybeTensor& mask, double factor,
                                   const Tensor& out, bool statistics) {
  using T = Compute<S>;
  const Reading<T> read = reading<T>(scale, shift, g.c);
  const Walk<T> walk(Axis::forward(g, 0), Axis::forward(g, 1), g.c, g.k);
  const int64_t tasks = task_count(g.n * g.out[0]);
  const Bands bands = walk.bands(g.n, tasks);
  const Scratch<T> packed = pack<S, T>(weight, g, walk.blocks, false);
  const int64_t share = aligned(walk.scratch_values(bands));
  const Scratch<T> scratch(tasks * share);

  const Images<const S> source = read_images<S>(x);
  const Images<S> target = write_images<S>(out);
  const S* bias_data = bias ? static_cast<const S*>(bias->const_data_ptr()) : nullptr;
  const Images<const uint8_t> kept =
      mask ? read_images<uint8_t>(*mask) : Images<const uint8_t>{nullptr, {}};

  std::vector<double> moments(statistics ? 2 * tasks * g.k : 0);  // [task][mean, m2][channel]
  std::vector<int64_t> counts(tasks);
  for_tasks(tasks, bands.count(), [&](int64_t task, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i];
      walk.template run<S>(
          band, source, read, packed.data, scratch.data + task * share,
          [&](int64_t y, int64_t x, int64_t, int64_t block, const Result<T>& result) {
            const int64_t j = walk.blocks.start(block);
            store_tile<S, T>(
                result, bias_data ? bias_data + j : nullptr,
                mask ? kept.line(band.n, y) + x * kept.strides.w + j * kept.strides.c : nullptr,
                kept.strides, static_cast<T>(factor),
                target.line(band.n, y) + x * target.strides.w + j * target.strides.c,
                target.strides);
          });
      if (statistics) {
        const int64_t rows = (band.end - band.begin) * g.out[1];
        double* mean = &moments[2 * task * g.k];
        merge_rows<S, T>(target.line(band.n, band.begin), {rows, g.k, target.strides.w},
                         counts[task], mean, mean + g.k);
        counts[task] += rows;
      }
    }
  });

  const int64_t channels = statistics ? g.k : 0;
  Tensor mean = torch::stable::empty({channels}, dtype_of<T>);
  Tensor var = torch::stable::empty({channels}, dtype_of<T>);
  for (int64_t j = 0; j < channels; ++j) {
    double total_mean = 0, total_m2 = 0, count = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      const double* part = &moments[2 * task * g.k + j];
      if (counts[task] > 0) merge(count, total_mean, total_m2, counts[task], part[0], part[g.k]);
      count += counts[task];
    }
    static_cast<T*>(mean.mutable_data_ptr())[j] = static_cast<T>(total_mean);
    static_cast<T*>(var.mutable_data_ptr())[j] = static_cast<T>(total_m2 / count);
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& x, const MaybeTensor& scale,
                                   const MaybeTensor& shift, const Tensor& weight,
                                   const MaybeTensor& bias, const Ints& stride, const Ints& padding,
                                   const Ints& dilation, const MaybeTensor& mask, double factor,
                                   const Tensor& out, bool statistics, bool) {
  const Geometry g = geometry(x, out, weight, stride, padding, dilation);
  const ScalarType dtype = x.scalar_type();
  expect_dtype("weight", weight, dtype);
  expect_dtype("out", out, dtype);
  if (bias) {
    expect_dtype("bias", *bias, dtype);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == g.k && bias->is_contiguous(),
                    "conv3x3: expected bias to be a contiguous vector of ", g.k);
  }
  if (mask) {
    expect_dtype("mask", *mask, ScalarType::Bool);
    bool same = mask->dim() == 4;
    for (int i = 0; same && i < 4; ++i) same = mask->size(i) == out.size(i);
    STD_TORCH_CHECK(same, "conv3x3: expected mask in the shape of out");
  }
  const bool rows =
      out.stride(1) == 1 && (g.out[0] == 1 || out.stride(2) == g.out[1] * out.stride(3));
  STD_TORCH_CHECK(!statistics || rows || g.k == 1,
                  "conv3x3: statistics need an output whose channels are its fastest axis");
  return dispatch(dtype, [&](auto value) {
    return forward<decltype(value)>(g, x, scale, shift, weight, bias, mask, factor, out,
                                    statistics);
  });
}

// ---- gradient of the input

template <typename S>
Tensor input_gradient(const Geometry& g, const Tensor& dy, const Tensor& weight,
                      const MaybeTensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                      const MaybeTensor& mean, const MaybeTensor& rstd, const Tensor& dx,
                      bool accumulate) {
  using T = Compute<S>;
  const T *s = vector<T>("scale", scale, g.c), *t = vector<T>("shift", shift, g.c);
  const T *mu = vector<T>("mean", mean, g.c), *r = vector<T>("rstd", rstd, g.c);
  const Walk<T> walk(Axis::backward(g, 0), Axis::backward(g, 1), g.k, g.c);
  const int64_t tasks = task_count(g.n * g.in[0]);
  const Bands bands = walk.bands(g.n, tasks);
  const Scratch<T> packed = pack<S, T>(weight, g, walk.blocks, true);
  const int64_t share = aligned(walk.scratch_values(bands));
  const Scratch<T> scratch(tasks * share);

  const Images<const S> source = read_images<S>(dy);
  const Images<const S> input = x ? read_images<S>(*x) : Images<const S>{nullptr, {}};
  const Images<S> target = write_images<S>(dx);
  std::vector<double> sums(x ? 2 * tasks * g.c : 0);  // [task][dbeta, dgamma][channel]
  for_tasks(tasks, bands.count(), [&](int64_t task, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i];
      walk.template run<S>(
          band, source, Reading<T>{}, packed.data, scratch.data + task * share,
          [&](int64_t y, int64_t px, int64_t step, int64_t block, const Result<T>& result) {
            const int64_t c = walk.blocks.start(block);
            S* to = target.line(band.n, y) + px * target.strides.w + c * target.strides.c;
            if (x) {
              double* dbeta = &sums[2 * task * g.c + c];
              answer_tile<S, T>(result, input.line(band.n, y) + px * input.strides.w + c,
                                step * input.strides.w, s + c, t + c, mu + c, r + c, dbeta,
                                dbeta + g.c, to, step * target.strides.w, accumulate);
            } else {
              Strides strides = target.strides;
              strides.w *= step;
              store_tile<S, T>(result, nullptr, nullptr, {}, T{1}, to, strides);
            }
          });
    }
  });

  const int64_t channels = x ? g.c : 0;
  Tensor total = torch::stable::empty({2, channels}, dtype_of<T>);
  T* total_data = static_cast<T*>(total.mutable_data_ptr());
  for (int64_t i = 0; i < 2 * channels; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[2 * task * g.c + i];
    total_data[i] = static_cast<T>(sum);
  }
  return total;
}

Tensor conv3x3_input_gradient(const Tensor& dy, const Tensor& weight, const Ints& stride,
                              const Ints& padding, const Ints& dilation, const MaybeTensor& x,
                              const MaybeTensor& scale, const MaybeTensor& shift,
                              const MaybeTensor& mean, const MaybeTensor& rstd, const Tensor& dx,
                              bool accumulate, bool) {
  const Geometry g = geometry(dx, dy, weight, stride, padding, dilation);
  const ScalarType dtype = dy.scalar_type();
  expect_dtype("weight", weight, dtype);
  expect_dtype("dx", dx, dtype);
  STD_TORCH_CHECK(x || !accumulate, "conv3x3: accumulate needs x and its vectors");
  if (x) {
    expect_dtype("x", *x, dtype);
    STD_TORCH_CHECK(scale && shift && mean && rstd, "conv3x3: x needs scale, shift, mean and rstd");
    bool same = x->dim() == 4;
    for (int i = 0; same && i < 4; ++i) same = x->size(i) == dx.size(i);
    STD_TORCH_CHECK(same, "conv3x3: expected x in the shape of dx");
    STD_TORCH_CHECK(g.c == 1 || (x->stride(1) == 1 && dx.stride(1) == 1),
                    "conv3x3: expected x and dx with channels as their fastest axis");
  }
  return dispatch(dtype, [&](auto value) {
    return input_gradient<decltype(value)>(g, dy, weight, x, scale, shift, mean, rstd, dx,
                                           accumulate);
  });
}

// ---- gradient of the weight

template <typename S>
Tensor weight_gradient(const Geometry& g, const Tensor& dy, const Tensor& x,
                       const MaybeTensor& scale, const MaybeTensor& shift) {
  using T = Compute<S>;
  const Reading<T> read = reading<T>(scale, shift, g.c);
  const WeightWalk<T> walk(g);
  const int64_t tasks = task_count(g.n * g.out[0]);
  const Bands bands = walk.bands(tasks);
  const int64_t share = aligned(walk.scratch_values(bands)), partial = walk.partial_values();
  const Scratch<T> scratch(tasks * share), partials(tasks * partial);
  const Images<const S> gradient = read_images<S>(dy), source = read_images<S>(x);
  for_tasks(tasks, bands.count(), [&](int64_t task, int64_t begin, int64_t end) {
    T* mine = partials.data + task * partial;
    std::fill_n(mine, partial, T{0});
    for (int64_t i = begin; i < end; ++i) {
      walk.template run<S>(bands[i], gradient, source, read, scratch.data + task * share, mine);
    }
  });

  Tensor dweight = torch::stable::empty({g.k, g.c, 3, 3}, dtype_of<T>);
  T* out = static_cast<T*>(dweight.mutable_data_ptr());
  torch::stable::parallel_for(0, g.k, 8, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) reduce_weight(walk, partials.data, tasks, j, out);
  });
  return dweight;
}

Tensor conv3x3_weight_gradient(const Tensor& dy, const Tensor& x, const MaybeTensor& scale,
                               const MaybeTensor& shift, const Ints& stride, const Ints& padding,
                               const Ints& dilation, bool) {
  STD_TORCH_CHECK(dy.dim() == 4 && x.dim() == 4, "conv3x3: expected 4-D images");
  const Tensor shape = torch::stable::empty({dy.size(1), x.size(1), 3, 3}, x.scalar_type());
  const Geometry g = geometry(x, dy, shape, stride, padding, dilation);
  expect_dtype("dy", dy, x.scalar_type());
  return dispatch(x.scalar_type(), [&](auto value) {
    return weight_gradient<decltype(value)>(g, dy, x, scale, shift);
  });
}

}  // namespace
}  // namespace conv3x3
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&memdense::conv3x3::conv3x3));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&memdense::conv3x3::conv3x3_input_gradient));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&memdense::conv3x3::conv3x3_weight_gradient));
}
