// The dilated 3x3 convolution on the CPU: operations around the kernels of conv3x3.h (direct),
// winograd3x3.h and amx3x3.h.
//
// Tasks own a fixed share of the work and their own scratch, sums and partial gradients; what they
// leave is merged in their order, so the same number of threads gives the same bits.
#include "conv3x3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <type_traits>

#include "../conv3x3_arguments.h"
#include "amx3x3.h"
#include "conv3x3_operations.h"
#include "tensors.h"
#include "winograd3x3.h"
#include "workers.h"

namespace memdense {
namespace conv3x3 {
namespace {

// ---- what the operations accept

// The pixels of a tensor [n, C, h, w].
template <typename S>
Images<S> images(const Tensor& t) {
  S* data;
  if constexpr (std::is_const_v<S>)
    data = static_cast<S*>(t.const_data_ptr());
  else
    data = static_cast<S*>(t.mutable_data_ptr());
  return {data, {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// Those of a matrix, whose rows they are.
template <typename S>
Images<S> rows(const char* name, const Tensor& t, const Geometry& g, int64_t columns) {
  S* data = matrix<S>(t, g.n * g.in[0] * g.in[1], columns, name);
  const int64_t row = t.stride(0);
  return {data, {g.in[0] * g.in[1] * row, 1, g.in[1] * row, row}};
}

template <typename T>
Reading<T> reading(const Norm<T>& norm) {
  return {norm.scale.data(), norm.shift.data()};
}

// ---- memory and threads of a call

template <typename T>
struct Scratch {
  Tensor tensor;
  T* data;

  explicit Scratch(int64_t values)
      : tensor(make<T>({std::max<int64_t>(values, 1)})),
        data(static_cast<T*>(tensor.mutable_data_ptr())) {}
};

int64_t aligned(int64_t values) { return round_up(values, 16); }

// f(walk) with the kernels for the geometry: of outputs, or `backward` of the inputs' gradient.
template <typename S, typename F>
auto with_walk(const Geometry& g, bool backward, int64_t tasks, const F& f) {
  using T = Compute<S>;
  const auto axis = backward ? Axis::backward : Axis::forward;
  const auto paired = backward ? winograd::PairedAxis::backward : winograd::PairedAxis::forward;
  const int64_t channels = backward ? g.k : g.c, columns = backward ? g.c : g.k;
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (amx_pays(g, channels, columns))
      return f(AmxWalk(axis(g, 0), axis(g, 1), channels, columns, g.n, tasks));
  }
  if (winograd::pays(g)) {
    const bool padded = winograd::padded(g);
    return f(winograd::Walk<T>(paired(g, 0, padded), paired(g, 1, padded), channels, columns, g.n,
                               backward));
  }
  return f(Walk<T>(axis(g, 0), axis(g, 1), channels, columns, g.n, tasks));
}

// What a walk works in, in one piece: packed weights, then each task's scratch.
struct WalkMemory {
  int64_t packed, share;

  template <typename Walk>
  explicit WalkMemory(const Walk& walk)
      : packed(aligned(walk.packed_values())), share(aligned(walk.scratch_values())) {}

  int64_t values(int64_t tasks) const { return packed + tasks * share; }
};

// Runs a walk in tasks; task t hands its results to emits[t].
template <typename S, typename T, typename Walk, typename Emit>
void run_walk(const Walk& walk, bool backward, const Images<const S>& source, Reading<T> read,
              const Tensor& weight, std::vector<Emit>& emits) {
  const int64_t tasks = static_cast<int64_t>(emits.size());
  const WalkMemory sizes(walk);
  const Scratch<T> memory(sizes.values(tasks));
  T *packed = memory.data, *scratch = packed + sizes.packed;
  const Weights<S> weights{static_cast<const S*>(weight.const_data_ptr()),
                           weight.stride(backward ? 0 : 1),
                           weight.stride(backward ? 1 : 0),
                           {weight.stride(2), weight.stride(3)}};
  constexpr int64_t kGroup = 32;  // channels that a walk may pack together
  const int64_t channels = weight.size(backward ? 0 : 1);
  torch::stable::parallel_for(
      0, (channels + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
        walk.pack(weights, begin * kGroup, std::min(end * kGroup, channels), packed);
      });

  Workers(walk.units(), tasks).run([&](int64_t task, int64_t begin, int64_t end) {
    walk.run(begin, end, source, read, packed, scratch + task * sizes.share, emits[task]);
  });
}

// ---- forward

// A task's outputs, on their way to bias, dropout and memory, and their statistics.
template <typename S, typename T>
struct Outputs {
  const Blocks<T>& blocks;
  const S* bias;
  Images<const bool> mask;  // may have no data
  T factor;
  Images<S> out;
  std::vector<double> mean, m2;  // [channel]; empty where nobody asks
  std::vector<int64_t> counts;   // of pixels, for each block

  Outputs(const Blocks<T>& blocks, const S* bias, Images<const bool> mask, T factor, Images<S> out,
          bool statistics)
      : blocks(blocks),
        bias(bias),
        mask(mask),
        factor(factor),
        out(out),
        mean(statistics ? blocks.columns : 0),
        m2(mean.size()),
        counts(blocks.count) {}

  void results(int64_t n, int64_t y, int64_t block, const Result<T>& result) const {
    const int64_t j = blocks.start(block);
    const auto line = [&](const auto& images) { return images.line(n, y) + j * images.strides.c; };
    memdense::dispatch<StoreTile<S, T>>(result, bias ? bias + j : nullptr,
                                        mask.data ? line(mask) : nullptr, mask.strides, factor,
                                        line(out), out.strides);
  }

  void stored(int64_t block, const T* values, int64_t count) {
    if (mean.empty()) return;
    const int64_t j = blocks.start(block);
    merge_rows<T>(values, {count, blocks.columns_of(block), blocks.width(block)}, counts[block],
                  &mean[j], &m2[j]);
    counts[block] += count;
  }
};

template <typename S>
void forward(const Geometry& g, const Images<const S>& x, Reading<Compute<S>> read,
             const Tensor& weight, const S* bias, const Images<const bool>& mask, double factor,
             const Images<S>& out, Compute<S>* mean, Compute<S>* var) {
  using T = Compute<S>;
  const int64_t tasks = worker_count(g.n * g.out[0]);
  with_walk<S>(g, false, tasks, [&](const auto& walk) {
    const Outputs<S, T> outputs(walk.blocks, bias, mask, static_cast<T>(factor), out,
                                mean != nullptr);
    std::vector<Outputs<S, T>> emits(tasks, outputs);
    run_walk<S>(walk, false, x, read, weight, emits);
    for (int64_t j = 0; mean && j < g.k; ++j) {
      double total_mean = 0, total_m2 = 0, count = 0;
      for (const auto& part : emits) {
        const double n = static_cast<double>(part.counts[0]);
        if (n > 0) merge(count, total_mean, total_m2, n, part.mean[j], part.m2[j]);
        count += n;
      }
      mean[j] = static_cast<T>(total_mean);
      var[j] = static_cast<T>(total_m2 / count);
    }
  });
}

}  // namespace

void conv3x3(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Ints& stride,
             const Ints& padding, const Ints& dilation, const Tensor& out, bool) {
  const Geometry g = geometry(x, out, stride, padding, dilation);
  expect_weight(weight, g, x.scalar_type());
  expect_dtype("out", out, x.scalar_type());
  expect_apart("out", out);
  with_value("x", x, [&]<typename S>(S) {
    const S* added = vector<const S>(bias, g.k, "bias");
    if (g.n == 0) return;
    forward<S>(g, images<const S>(x), {}, weight, added, {}, 1, images<S>(out), nullptr, nullptr);
  });
}

namespace {

void bn_relu_conv3x3(const Tensor& y, const Tensor& mean, const Tensor& var,
                     const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                     const Tensor& weight, const Ints& dilation, int64_t n, int64_t h, int64_t w,
                     const MaybeTensor& keep, double factor, const Tensor& out,
                     const MaybeTensor& moments, bool) {
  const Geometry g = geometry(n, h, w, y, out, dilation);
  expect_weight(weight, g, y.scalar_type());
  with_value("y", y, [&]<typename S>(S) {
    using T = Compute<S>;
    const TwoRows<T> statistics(moments, g.k, "moments");
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, g.c);
    forward<S>(g, rows<const S>("y", y, g, g.c), reading(vectors), weight, nullptr,
               keep ? rows<const bool>("keep", *keep, g, g.k) : Images<const bool>{}, factor,
               rows<S>("out", out, g, g.k), statistics.first, statistics.second);
  });
}

// ---- gradient of the input

// A task's gradients of z, on their way through the relu into memory, and their two sums.
template <typename S, typename T>
struct Gradients {
  const Blocks<T>& blocks;
  Images<const S> x;  // without data: dx is all that is wanted
  Reader<T> read;
  Images<S> dx;
  bool accumulate;
  std::vector<double> dbeta, dgamma;

  void results(int64_t n, int64_t y, int64_t block, const Result<T>& result) {
    const int64_t c = blocks.start(block);
    S* to = dx.line(n, y) + c * dx.strides.c;
    if (x.data) {
      memdense::dispatch<AnswerTile<S, T>>(AnswerTile<S, T>{result, x.line(n, y) + c, x.strides.w,
                                                            read.from(c), &dbeta[c], &dgamma[c], to,
                                                            dx.strides.w, accumulate});
    } else {
      const S* bias = nullptr;
      const bool* mask = nullptr;
      memdense::dispatch<StoreTile<S, T>>(result, bias, mask, Strides{}, T{1}, to, dx.strides);
    }
  }

  void stored(int64_t, const T*, int64_t) const {}
};

// Of z where there is a norm, and then dbeta and dgamma; else of x.
template <typename S>
void input_gradient(const Geometry& g, const Images<const S>& dy, const Tensor& weight,
                    const Images<const S>& x, const Reader<Compute<S>>& read, const Images<S>& dx,
                    bool accumulate, Compute<S>* dbeta, Compute<S>* dgamma) {
  using T = Compute<S>;
  const int64_t channels = x.data ? g.c : 0, tasks = worker_count(g.n * g.in[0]);
  with_walk<S>(g, true, tasks, [&](const auto& walk) {
    const std::vector<double> zeros(channels);
    const Gradients<S, T> gradients{walk.blocks, x, read, dx, accumulate, zeros, zeros};
    std::vector<Gradients<S, T>> emits(tasks, gradients);
    run_walk<S>(walk, true, dy, Reading<T>{}, weight, emits);
    for (int64_t c = 0; c < channels; ++c) {
      double sums[2] = {0, 0};
      for (const auto& part : emits) {
        sums[0] += part.dbeta[c];
        sums[1] += part.dgamma[c];
      }
      dbeta[c] = static_cast<T>(sums[0]);
      dgamma[c] = static_cast<T>(sums[1]);
    }
  });
}

}  // namespace

void conv3x3_input_gradient(const Tensor& dy, const Tensor& weight, const Ints& stride,
                            const Ints& padding, const Ints& dilation, const Tensor& dx, bool) {
  const Geometry g = geometry(dx, dy, stride, padding, dilation);
  expect_weight(weight, g, dy.scalar_type());
  expect_dtype("dx", dx, dy.scalar_type());
  expect_apart("dx", dx);
  with_value("dy", dy, [&]<typename S>(S) {
    if (g.n == 0) return;
    input_gradient<S>(g, images<const S>(dy), weight, {}, {}, images<S>(dx), false, nullptr,
                      nullptr);
  });
}

namespace {

// ---- gradient of the weight

// Output pixels whose sum is taken before it is added to the rest: short chains round less.
constexpr int64_t kPartialPixels = 4096;

// to += values
template <typename T>
struct Add {
  template <int>
  static MEMDENSE_INLINE void run(const T* __restrict__ values, int64_t count, T* __restrict__ to) {
    for (int64_t i = 0; i < count; ++i) to[i] += values[i];
  }
};

// Units of a walk whose sum is taken before it is added to the rest.
template <typename Walk>
int64_t group_units(const Walk& walk) {
  return std::max<int64_t>(1, kPartialPixels / walk.pixels_of_unit());
}

// What walks, each by `shares` tasks, work in, in one piece: all tasks' sums, then, if any takes
// them in groups, a group's of each, then each task's scratch.
struct WeightMemory {
  int64_t partial = 0, scratch = 0;
  bool grouped = false;

  template <typename Walk>
  WeightMemory(const std::vector<Walk>& walks, int64_t shares) {
    for (const Walk& walk : walks) {
      partial = std::max(partial, aligned(walk.partial_values()));
      scratch = std::max(scratch, aligned(walk.scratch_values()));
      grouped = grouped || (walk.units() + shares - 1) / shares > group_units(walk);
    }
  }

  int64_t values(int64_t tasks) const { return tasks * (scratch + (grouped ? 2 : 1) * partial); }
};

// Walks over equal parts of the channels, `step` apart, each by as many tasks as the next.
template <typename S, typename Walk>
void run_weight_walks(const std::vector<Walk>& walks, int64_t step, int64_t tasks,
                      const Geometry& g, const Images<const S>& dy, const Images<const S>& x,
                      const Reading<Compute<S>>& read, Compute<S>* dweight) {
  using T = Compute<S>;
  const int64_t shares = tasks / static_cast<int64_t>(walks.size());
  const WeightMemory sizes(walks, shares);
  const Scratch<T> memory(sizes.values(tasks));
  T *partials = memory.data, *groups = partials + tasks * sizes.partial;
  T* scratch = groups + (sizes.grouped ? tasks * sizes.partial : 0);
  Workers(tasks, tasks).run([&](int64_t task, int64_t, int64_t) {
    const Walk& walk = walks[task / shares];
    const int64_t channel = task / shares * step, share = task % shares,
                  size = walk.partial_values();
    const int64_t begin = share * walk.units() / shares, end = (share + 1) * walk.units() / shares;
    const Images<const S> source{x.data + channel * x.strides.c, x.strides};
    const Reading<T> reading =
        read.scale ? Reading<T>{read.scale + channel, read.shift + channel} : read;
    T* mine = partials + task * sizes.partial;
    std::fill_n(mine, size, T{0});
    const int64_t units = group_units(walk);
    for (int64_t first = begin, last; first < end; first = last) {
      // a last group may be a little larger
      last = end - first < 2 * units ? end : first + units;
      T* sums = mine;
      if (first > begin) {
        sums = groups + task * sizes.partial;
        std::fill_n(sums, size, T{0});
      }
      walk.run(first, last, dy, source, reading, scratch + task * sizes.scratch, sums);
      if (first > begin) memdense::dispatch<Add<T>>(sums, size, mine);
    }
  });
  torch::stable::parallel_for(0, g.k, 8, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < walks.size(); ++i) {
      walks[i].reduce(partials + i * shares * sizes.partial, sizes.partial, shares, begin, end,
                      dweight + i * step * 9, g.c * 9);
    }
  });
}

// f(walks, step) with the kernels for the geometry, as run_weight_walks() takes them.
template <typename S, typename F>
auto with_weight_walks(const Geometry& g, int64_t tasks, const F& f) {
  using T = Compute<S>;
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (amx_pays(g, g.c, g.k)) return f(std::vector{AmxWeightWalk(g, tasks)}, 0);
  }
  if (!winograd::pays(g)) return f(std::vector{WeightWalk<T>(g, tasks)}, 0);
  using Walk = winograd::WeightWalk<T>;
  const bool padded = winograd::padded(g);
  const Walk whole(g, padded);
  const Blocks<T>& blocks = whole.blocks;
  const int64_t parts = whole.wide() ? std::gcd(tasks, blocks.count) : 1;
  const int64_t step = blocks.start(blocks.count / parts);
  std::vector<Walk> walks;
  for (int64_t i = 0; i < parts; ++i) {
    Geometry part = g;
    part.c = i + 1 < parts ? step : g.c - i * step;
    walks.emplace_back(part, padded);
  }
  return f(walks, step);
}

template <typename S>
void weight_gradient(const Geometry& g, const Images<const S>& dy, const Images<const S>& x,
                     Reading<Compute<S>> read, Compute<S>* dweight) {
  const int64_t tasks = worker_count(g.n * g.out[0]);
  with_weight_walks<S>(g, tasks, [&](const auto& walks, int64_t step) {
    run_weight_walks<S>(walks, step, tasks, g, dy, x, read, dweight);
  });
}

}  // namespace

Tensor conv3x3_weight_gradient(const Tensor& dy, const Tensor& x, const Ints& stride,
                               const Ints& padding, const Ints& dilation, bool) {
  const Geometry g = geometry(x, dy, stride, padding, dilation);
  expect_dtype("dy", dy, x.scalar_type());
  STD_TORCH_CHECK(g.k >= 1 && g.c >= 1, "conv3x3: expected channels");
  return with_value("x", x, [&]<typename S>(S) {
    using T = Compute<S>;
    const Tensor dweight = make<T>({g.k, g.c, 3, 3});
    T* result = static_cast<T*>(dweight.mutable_data_ptr());
    if (g.n == 0) {
      std::fill_n(result, 9 * g.k * g.c, T{0});
    } else {
      weight_gradient<S>(g, images<const S>(dy), images<const S>(x), {}, result);
    }
    return dweight;
  });
}

namespace {

// ---- both, of a dense layer's second half

void bn_relu_conv3x3_backward(const Tensor& dy, const Tensor& weight, const Ints& dilation,
                              const Tensor& y, const Tensor& mean, const Tensor& var,
                              const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                              int64_t n, int64_t h, int64_t w, const Tensor& dz,
                              const Tensor& dbeta, const Tensor& dgamma, const MaybeTensor& dweight,
                              bool accumulate, bool) {
  const Geometry g = geometry(n, h, w, y, dy, dilation);
  expect_weight(weight, g, y.scalar_type());
  with_value("y", y, [&]<typename S>(S) {
    using T = Compute<S>;
    const Images<const S> gradient = rows<const S>("dy", dy, g, g.k);
    const Images<const S> input = rows<const S>("y", y, g, g.c);
    const Norm<T> vectors = norm<T>(mean, var, gamma, beta, eps, g.c);
    if (dweight) expect_weight_gradient(*dweight, g, kScalarType<T>);
    input_gradient<S>(g, gradient, weight, input, vectors.reader(), rows<S>("dz", dz, g, g.c),
                      accumulate, vector<T>(dbeta, g.c, "dbeta"), vector<T>(dgamma, g.c, "dgamma"));
    if (dweight) {
      weight_gradient<S>(g, gradient, input, reading(vectors),
                         static_cast<T*>(dweight->mutable_data_ptr()));
    }
  });
}

// ---- memory

// Bytes of tensors that a layer's second half takes beside its results on so many threads: its
// forward, or the larger of its two gradients.
int64_t conv3x3_scratch(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, const Ints& dilation,
                        int64_t threads, bool bfloat16, bool backward) {
  STD_TORCH_CHECK(std::min({n, h, w, c, k, threads}) >= 1,
                  "conv3x3_scratch: expected sizes and threads of at least 1");
  STD_TORCH_CHECK(std::max({n, h, w, threads}) < kLimit,
                  "conv3x3_scratch: expected sizes and threads below 2^31");
  const Geometry g = geometry(n, h, w, c, k, dilation);
  const int64_t tasks = worker_count(n * h, threads);
  const auto values = [&]<typename S>(S) -> int64_t {
    const int64_t walk = with_walk<S>(
        g, backward, tasks, [&](const auto& walk) { return WalkMemory(walk).values(tasks); });
    if (!backward) return walk;
    return std::max(
        walk, with_weight_walks<S>(g, tasks, [&](const auto& walks, int64_t) {
          return WeightMemory(walks, tasks / static_cast<int64_t>(walks.size())).values(tasks);
        }));
  };
  return (bfloat16 ? values(BFloat16{}) : values(float{})) * static_cast<int64_t>(sizeof(float));
}

}  // namespace
}  // namespace conv3x3
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_scratch", TORCH_BOX(&memdense::conv3x3::conv3x3_scratch));
}

STABLE_TORCH_LIBRARY_IMPL(memdense, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&memdense::conv3x3::conv3x3));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&memdense::conv3x3::conv3x3_input_gradient));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&memdense::conv3x3::conv3x3_weight_gradient));
  m.impl("bn_relu_conv3x3", TORCH_BOX(&memdense::conv3x3::bn_relu_conv3x3));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&memdense::conv3x3::bn_relu_conv3x3_backward));
}
