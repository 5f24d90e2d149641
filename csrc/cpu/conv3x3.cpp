// The dilated 3x3 convolution on the CPU: operations around the kernels of conv3x3.h (direct) and
// winograd3x3.h.
//
// Tasks own a fixed share of the work and their own scratch, sums and partial gradients; what they
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

#include "winograd3x3.h"

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

// f(walk) with the kernels for the geometry: of outputs, or `backward` of the inputs' gradient.
template <typename T, typename F>
auto with_walk(const Geometry& g, bool backward, int64_t tasks, const F& f) {
  const auto axis = backward ? Axis::backward : Axis::forward;
  const auto paired = backward ? winograd::PairedAxis::backward : winograd::PairedAxis::forward;
  const int64_t channels = backward ? g.k : g.c, columns = backward ? g.c : g.k;
  if (winograd::pays(g)) {
    return f(winograd::Walk<T>(paired(g, 0), paired(g, 1), channels, columns, g.n, backward));
  }
  return f(Walk<T>(axis(g, 0), axis(g, 1), channels, columns, g.n, tasks));
}

// Runs a walk in tasks; task t hands its results to emits[t].
template <typename S, typename T, typename Walk, typename Emit>
void run_walk(const Walk& walk, bool backward, const Tensor& images, Reading<T> read,
              const Tensor& weight, std::vector<Emit>& emits) {
  const Scratch<T> packed(walk.packed_values());
  const int64_t channel_stride = weight.stride(backward ? 0 : 1);
  const int64_t column_stride = weight.stride(backward ? 1 : 0);
  const int64_t taps[2] = {weight.stride(2), weight.stride(3)};
  const S* data = static_cast<const S*>(weight.const_data_ptr());
  torch::stable::parallel_for(
      0, weight.size(backward ? 0 : 1), 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          walk.pack(data + r * channel_stride, taps, column_stride, r, packed.data);
        }
      });

  const int64_t tasks = static_cast<int64_t>(emits.size()), share = aligned(walk.scratch_values());
  const Scratch<T> scratch(tasks * share);
  const Images<const S> source = read_images<S>(images);
  for_tasks(tasks, walk.units(), [&](int64_t task, int64_t begin, int64_t end) {
    walk.run(begin, end, source, read, packed.data, scratch.data + task * share, emits[task]);
  });
}

// ---- forward

// A task's outputs, on their way to bias, dropout and memory, and their statistics.
template <typename S, typename T>
struct Outputs {
  const Blocks<T>& blocks;
  const S* bias;
  Images<const uint8_t> mask;  // may have no data
  T factor;
  Images<S> out;
  std::vector<double> mean, m2;  // [channel]; empty where nobody asks
  std::vector<int64_t> counts;   // of pixels, for each block

  Outputs(const Blocks<T>& blocks, const S* bias, Images<const uint8_t> mask, T factor,
          Images<S> out, bool statistics)
      : blocks(blocks),
        bias(bias),
        mask(mask),
        factor(factor),
        out(out),
        mean(statistics ? blocks.columns : 0),
        m2(mean.size()),
        counts(blocks.count) {}

  void results(int64_t n, int64_t y, int64_t x, int64_t step, int64_t block,
               const Result<T>& result) const {
    const int64_t j = blocks.start(block);
    const auto first = [&](const auto& images) {
      return images.line(n, y) + x * images.strides.w + j * images.strides.c;
    };
    const auto strides_of = [&](Strides strides) {
      strides.w *= step;
      return strides;
    };
    store_tile<S, T>(result, bias ? bias + j : nullptr, mask.data ? first(mask) : nullptr,
                     strides_of(mask.strides), factor, first(out), strides_of(out.strides));
  }

  void stored(int64_t block, const T* values, int64_t count) {
    if (mean.empty()) return;
    const int64_t j = blocks.start(block);
    merge_rows<T, T>(values, {count, blocks.columns_of(block), blocks.width(block)}, counts[block],
                     &mean[j], &m2[j]);
    counts[block] += count;
  }
};

template <typename S>
std::tuple<Tensor, Tensor> forward(const Geometry& g, const Tensor& x, const MaybeTensor& scale,
                                   const MaybeTensor& shift, const Tensor& weight,
                                   const MaybeTensor& bias, const MaybeTensor& mask, double factor,
                                   const Tensor& out, bool statistics) {
  using T = Compute<S>;
  const int64_t channels = statistics ? g.k : 0, tasks = task_count(g.n * g.out[0]);
  Tensor mean = torch::stable::empty({channels}, dtype_of<T>);
  Tensor var = torch::stable::empty({channels}, dtype_of<T>);
  with_walk<T>(g, false, tasks, [&](const auto& walk) {
    const Outputs<S, T> outputs(
        walk.blocks, bias ? static_cast<const S*>(bias->const_data_ptr()) : nullptr,
        mask ? read_images<uint8_t>(*mask) : Images<const uint8_t>{nullptr, {}},
        static_cast<T>(factor), write_images<S>(out), statistics);
    std::vector<Outputs<S, T>> emits(tasks, outputs);
    run_walk<S>(walk, false, x, reading<T>(scale, shift, g.c), weight, emits);
    for (int64_t j = 0; j < channels; ++j) {
      double total_mean = 0, total_m2 = 0, count = 0;
      for (const auto& part : emits) {
        const double n = static_cast<double>(part.counts[0]);
        if (n > 0) merge(count, total_mean, total_m2, n, part.mean[j], part.m2[j]);
        count += n;
      }
      static_cast<T*>(mean.mutable_data_ptr())[j] = static_cast<T>(total_mean);
      static_cast<T*>(var.mutable_data_ptr())[j] = static_cast<T>(total_m2 / count);
    }
  });
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
  return dispatch(dtype, [&](auto value) {
    return forward<decltype(value)>(g, x, scale, shift, weight, bias, mask, factor, out,
                                    statistics);
  });
}

// ---- gradient of the input

// A task's gradients of z, on their way through the relu into memory, and their two sums.
template <typename S, typename T>
struct Gradients {
  const Blocks<T>& blocks;
  Images<const S> x;  // without data: dx is all that is wanted
  const T *scale, *shift, *mean, *rstd;
  Images<S> dx;
  bool accumulate;
  std::vector<double> dbeta, dgamma;

  void results(int64_t n, int64_t y, int64_t px, int64_t step, int64_t block,
               const Result<T>& result) {
    const int64_t c = blocks.start(block);
    Strides strides = dx.strides;
    strides.w *= step;
    S* to = dx.line(n, y) + px * dx.strides.w + c * strides.c;
    if (x.data) {
      memdense::dispatch<AnswerTile<S, T>>(AnswerTile<S, T>{
          result, x.line(n, y) + px * x.strides.w + c, step * x.strides.w, scale + c, shift + c,
          mean + c, rstd + c, &dbeta[c], &dgamma[c], to, strides.w, accumulate});
    } else {
      store_tile<S, T>(result, nullptr, nullptr, {}, T{1}, to, strides);
    }
  }

  void stored(int64_t, const T*, int64_t) const {}
};

template <typename S>
Tensor input_gradient(const Geometry& g, const Tensor& dy, const Tensor& weight,
                      const MaybeTensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                      const MaybeTensor& mean, const MaybeTensor& rstd, const Tensor& dx,
                      bool accumulate) {
  using T = Compute<S>;
  const int64_t channels = x ? g.c : 0, tasks = task_count(g.n * g.in[0]);
  Tensor total = torch::stable::empty({2, channels}, dtype_of<T>);
  with_walk<T>(g, true, tasks, [&](const auto& walk) {
    const std::vector<double> zeros(channels);
    const Gradients<S, T> gradients{walk.blocks,
                                    x ? read_images<S>(*x) : Images<const S>{nullptr, {}},
                                    vector<T>("scale", scale, g.c),
                                    vector<T>("shift", shift, g.c),
                                    vector<T>("mean", mean, g.c),
                                    vector<T>("rstd", rstd, g.c),
                                    write_images<S>(dx),
                                    accumulate,
                                    zeros,
                                    zeros};
    std::vector<Gradients<S, T>> emits(tasks, gradients);
    run_walk<S>(walk, true, dy, Reading<T>{}, weight, emits);
    T* total_data = static_cast<T*>(total.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      double dbeta = 0, dgamma = 0;
      for (const auto& part : emits) {
        dbeta += part.dbeta[c];
        dgamma += part.dgamma[c];
      }
      total_data[c] = static_cast<T>(dbeta);
      total_data[channels + c] = static_cast<T>(dgamma);
    }
  });
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

// Output pixels whose sum is taken before it is added to the rest: short chains round less.
constexpr int64_t kPartialPixels = 4096;

template <typename T>
MEMDENSE_SIMD void add(const T* __restrict__ values, int64_t count, T* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] += values[i];
}

template <typename S>
Tensor weight_gradient(const Geometry& g, const Tensor& dy, const Tensor& x,
                       const MaybeTensor& scale, const MaybeTensor& shift) {
  using T = Compute<S>;
  const Reading<T> read = reading<T>(scale, shift, g.c);
  const int64_t tasks = task_count(g.n * g.out[0]);
  Tensor dweight = torch::stable::empty({g.k, g.c, 3, 3}, dtype_of<T>);
  const auto run = [&](const auto& walk) {
    const int64_t share = aligned(walk.scratch_values()), partial = walk.partial_values();
    const Scratch<T> scratch(tasks * share), partials(tasks * partial);
    const Images<const S> gradient = read_images<S>(dy), source = read_images<S>(x);
    for_tasks(tasks, walk.units(), [&](int64_t task, int64_t begin, int64_t end) {
      T* mine = partials.data + task * partial;
      std::fill_n(mine, partial, T{0});
      const int64_t units = std::max<int64_t>(1, kPartialPixels / walk.pixels_of_unit());
      const Scratch<T> group(end - begin > units ? partial : 0);
      for (int64_t first = begin, last; first < end; first = last) {
        // a last group may be a little larger
        last = end - first < 2 * units ? end : first + units;
        T* sums = mine;
        if (first > begin) {
          sums = group.data;
          std::fill_n(sums, partial, T{0});
        }
        walk.run(first, last, gradient, source, read, scratch.data + task * share, sums);
        if (first > begin) add(sums, partial, mine);
      }
    });
    T* out = static_cast<T*>(dweight.mutable_data_ptr());
    torch::stable::parallel_for(0, g.k, 8, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) walk.reduce(partials.data, tasks, j, out);
    });
  };
  winograd::pays(g) ? run(winograd::WeightWalk<T>(g)) : run(WeightWalk<T>(g, tasks));
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
