// The two halves that every primitive shares: reading a tile through BatchNorm and ReLU, and
// answering for it, z = relu(scale * x + shift) and dz = da * [z > 0], g += scale * dz.
//
// A NaN passes both, as it does PyTorch's relu and threshold_backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "norm.h"
#include "vector.h"

namespace memdense {

// Which rows of X a row stands for: itself, or with 2x2 pooling the four pixels under it.
template <int kTaps>
struct Pixels {
  static constexpr int taps = kTaps;
  int64_t h, w;  // of X's images; not used without pooling

  int64_t row(int64_t i) const {
    if constexpr (kTaps == 1) return i;
    const int64_t x = i % (w / 2), line = i / (w / 2);
    const int64_t y = line % (h / 2), n = line / (h / 2);
    return (n * h + 2 * y) * w + 2 * x;
  }
  int64_t tap(int t) const { return t / 2 * w + t % 2; }
};

// z[r][j] = mean over taps of relu(scale * x + shift) at columns first + j, for `rows` rows.
template <typename S, typename T, int kBytes, int kTaps, typename Z>
MEMDENSE_INLINE void read_tile(const S* x, int64_t x_row, const int64_t* source,
                               Pixels<kTaps> pixels, Reader<T> read, int64_t first, int64_t columns,
                               int64_t rows, Z* z, int64_t z_row) {
  for (int64_t r = 0; r < rows; ++r, z += z_row) {
    for_columns<T, kBytes, 1>(0, columns, [&]<typename Vec, int>(int64_t j) MEMDENSE_INLINE_LAMBDA {
      const int64_t c = first + j;
      const Vec scale = load<Vec>(read.scale + c), shift = load<Vec>(read.shift + c);
      Vec sum = Vec{};
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) {
        Vec v = load<Vec>(x + (source[r] + pixels.tap(t)) * x_row + c) * scale + shift;
        v = v <= T{0} ? Vec{} : v;
        sum = t == 0 ? v : sum + v;
      }
      store(z + j, kTaps == 1 ? sum : sum * (T{1} / kTaps));
    });
  }
}

// Does G store less than it is given? Sums of what it took in are wanted then.
template <typename G>
constexpr bool kRounds = !std::is_same_v<G, Compute<G>>;

// Sums that an answer adds to, each of a value per channel.
template <typename G>
constexpr int64_t kSums = kRounds<G> ? 4 : 2;

// A tile's rows, its incoming gradient, and where the answer goes.
template <typename S, typename D, typename G, int kTaps, typename Z = Compute<S>>
struct Answer {
  using T = Compute<S>;

  int64_t rows;
  const int64_t* source;  // each row's first pixel
  Pixels<kTaps> pixels;
  const D* da;  // gradient of the tile's z, its first column being `first`
  int64_t da_row;
  const S* x;
  int64_t x_row;
  G* g;
  int64_t g_row;
  bool add;  // to g; else it holds nothing yet
  Reader<T> read;
  // [kSums][channels] += sum dz, sum dz * (x - mean), and where g rounds both with what it took in
  // in place of dz: whoever totals them multiplies with rstd
  double* sums;
  int64_t channels;
  Z* z;  // where z is wanted, like da
  int64_t z_row;
};

// Values whose sum stays in their own precision before double takes it.
constexpr int64_t kSumRows = 16;

// g (+)= scale * dz and both sums for columns first..first + columns.
template <int kBytes, bool kRelu, typename S, typename D, typename G, int kTaps, typename Z>
MEMDENSE_INLINE void answer_tile(const Answer<S, D, G, kTaps, Z>& a, int64_t first,
                                 int64_t columns) {
  using T = Compute<S>;
  constexpr int kCount = Simd<T, kBytes>::kVectors;
  for_columns<T, kBytes, kCount>(
      0, columns, [&]<typename Vec, int kVectors>(int64_t j) MEMDENSE_INLINE_LAMBDA {
        constexpr int64_t kLanes = sizeof(Vec) / sizeof(T);
        const int64_t c = first + j;
        Vec scale[kVectors], shift[kVectors], mean[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          scale[v] = load<Vec>(a.read.scale + c + v * kLanes);
          shift[v] = load<Vec>(a.read.shift + c + v * kLanes);
          mean[v] = load<Vec>(a.read.mean + c + v * kLanes);
        }
        for (int64_t top = 0; top < a.rows; top += kSumRows / kTaps) {
          const int64_t end = std::min(a.rows, top + kSumRows / kTaps);
          Vec sums[kSums<G>][kVectors] = {};
          for (int64_t r = top; r < end; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              Vec da = load<Vec>(a.da + r * a.da_row + j + v * kLanes), sum = Vec{};
              if (kTaps > 1) da *= T{1} / kTaps;
#pragma GCC unroll 4
              for (int t = 0; t < kTaps; ++t) {
                const int64_t row = a.source[r] + a.pixels.tap(t), at = c + v * kLanes;
                const Vec x = load<Vec>(a.x + row * a.x_row + at);
                const Vec z = x * scale[v] + shift[v];
                const Vec dz = kRelu ? (z <= T{0} ? Vec{} : da) : da;
                G* g = a.g + row * a.g_row + at;
                sums[0][v] += dz;
                sums[1][v] += dz * (x - mean[v]);
                if constexpr (kRounds<G>) {
                  const Vec before = a.add ? load<Vec>(g) : Vec{};
                  store(g, before + scale[v] * dz);
                  const Vec taken = load<Vec>(g) - before;
                  sums[2][v] += taken;
                  sums[3][v] += taken * (x - mean[v]);
                } else {
                  store(g, a.add ? load<Vec>(g) + scale[v] * dz : scale[v] * dz);
                }
                if (a.z) sum = sum + (z <= T{0} ? Vec{} : z);
              }
              if (a.z) {
                store(a.z + r * a.z_row + j + v * kLanes, kTaps > 1 ? sum * (T{1} / kTaps) : sum);
              }
            }
          }
          T part[kSums<G>][kVectors * kLanes];
          std::memcpy(part, sums, sizeof(part));
          for (int64_t s = 0; s < kSums<G>; ++s) {
            for (int64_t i = 0; i < kVectors * kLanes; ++i) {
              a.sums[s * a.channels + c + i] += part[s][i];
            }
          }
        }
      });
}

}  // namespace memdense
