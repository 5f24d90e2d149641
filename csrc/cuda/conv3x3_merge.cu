// The second steps: what teams left behind, put together in their order.
#include "conv3x3.h"

namespace memdense::conv3x3 {
namespace {

using namespace device;

constexpr int kWarps = 8;

// Chan's formula over a column's walkers: a lane takes every 32nd, then lanes pair up.
MEMDENSE_KERNEL(kWarps* kWarp, 1) merge_columns(const Merge a) {
  const int column = block() * kWarps + thread() / kWarp, lane = thread() % kWarp;
  if (column >= a.columns) return;
  const int64_t plane = static_cast<int64_t>(a.columns) * a.walkers;
  const float* means = a.partials + static_cast<int64_t>(column) * a.walkers;
  const float *m2s = means + plane, *counts = a.partials + 2 * plane;
  double count = 0, mean = 0, m2 = 0;
  for (int i = lane; i < a.walkers; i += kWarp) {
    merge<double>(count, mean, m2, counts[i], means[i], m2s[i]);
  }
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) {
    const double other = exchange(count, mask), other_mean = exchange(mean, mask);
    merge(count, mean, m2, other, other_mean, exchange(m2, mask));
  }
  if (lane == 0) {
    a.mean[column] = static_cast<float>(mean);
    a.var[column] = static_cast<float>(m2 / count);
  }
}

// dweight by the first blocks, a thread each value; dbeta and dgamma by the others, a warp each.
MEMDENSE_KERNEL(kWarps* kWarp, 1) reduce(const Reduction a) {
  if (block() < a.weight_blocks) {
    const int64_t plane = static_cast<int64_t>(a.columns) * a.channels, count = kTaps * plane;
    const int64_t i = static_cast<int64_t>(block()) * threads() + thread();
    if (i >= count) return;
    float sum = 0;
    constexpr int kLoads = 16;  // in flight
    for (int first = 0; first < a.splits; first += kLoads) {
      float parts[kLoads];
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        parts[s] = first + s < a.splits ? a.weight_partials[(first + s) * count + i] : 0.f;
      }
#pragma unroll
      for (int s = 0; s < kLoads; ++s) sum += parts[s];
    }
    a.dweight[i % plane * kTaps + i / plane] = sum;
    return;
  }
  const int row = (block() - a.weight_blocks) * kWarps + thread() / kWarp, lane = thread() % kWarp;
  if (row >= 2 * a.channels) return;
  const float* values = a.sums + static_cast<int64_t>(row) * a.walkers;
  double sum = 0;
  for (int i = lane; i < a.walkers; i += kWarp) sum += values[i];
  for (int mask = kWarp / 2; mask >= 1; mask /= 2) sum += exchange(sum, mask);
  if (lane > 0) return;
  if (row < a.channels) {
    a.dbeta[row] = static_cast<float>(sum);
  } else {
    const int c = row - a.channels;
    a.dgamma[c] = static_cast<float>(sum / square_root(static_cast<double>(a.var[c]) + a.eps));
  }
}

int blocks_for(int64_t count, int block) { return static_cast<int>(quotient_up(count, block)); }

}  // namespace

void merge_moments(const Merge& a, Stream stream) {
  device::launch(merge_columns, {blocks_for(a.columns, kWarps), 1, kWarps * kWarp, 0}, stream, a);
}

void reduce_partials(Reduction a, Stream stream) {
  const int64_t values = int64_t{kTaps} * a.columns * a.channels;
  a.weight_blocks = a.dweight ? blocks_for(values, kWarps * kWarp) : 0;
  const int sum_blocks = a.sums ? blocks_for(2 * a.channels, kWarps) : 0;
  device::launch(reduce, {a.weight_blocks + sum_blocks, 1, kWarps * kWarp, 0}, stream, a);
}

}  // namespace memdense::conv3x3
