// The dilated 3x3 convolution as its kernels see it: plain pointers, strides and a walk over tiles.
//
// A tile is a rectangle of outputs. Its inputs (the halo) are staged in shared memory once, a chunk
// of channels at a time, and serve all nine taps. Outputs whose coordinates agree modulo the
// dilation form a phase: within a phase every convolution has dilation 1, so tiles lie in phases.
// Rows of tiles run on through phases and images, so small images fill them too.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "launches.h"

namespace memdense::conv3x3 {

using device::Grid;

inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// of [N, H, W, C], in elements
struct Strides {
  int64_t n, h, w, c;
};

// Output a + dilation*q of phase a reads, by tap t, position
//   offset + stride*a + dilation*(stride*q + t)
// of an input with `spread` - 1 zeros between its pixels and zeros around.
struct Axis {
  int out, in;
  int stride, spread, dilation, offset;
  int phases, steps;  // min(dilation, out) phases with at most `steps` outputs
};

// For dividing by a number that is known before the launch: (n * factor / 2^32 + n) / 2^shift.
struct Divisor {
  int value;
  uint32_t factor;
  int shift;
};

struct Walk {
  int images;
  Axis y, x;
  int height, width;     // of a tile
  int halo_width, halo;  // pixels staged for a tile: of a line, and of all at most
  int pixels;            // rows of the tile's matrix: height * width and some that are not used
  int across;            // tiles beside each other
  int tiles;
  Divisor by_width, by_halo_width;
  Divisor by_widths, by_across;  // tiles beside each other in a phase, in all
  // output lines and halo lines of an image's phase, phases
  Divisor by_steps, by_halo_lines, by_phases;
};

// mean and variance, eps, gamma and beta of the C channels; the latter in float or in the values'
// type, or null.
struct Norm {
  const float *mean, *var;
  const void *gamma, *beta;
  bool gamma_float, beta_float;
  float eps;
};

// Structs that kernels take say with pointers() where all of theirs are: see launches.h.

enum class Mode {
  kPlain,     // out = conv(x) + bias
  kForward,   // out = conv(relu(s*y + t)) with dropout, and its statistics
  kGradient,  // dz = conv(dy) * [s*y + t > 0], with its sums
};

// out[pixel, j] = sum over taps and channels of source[pixel + tap, c] * weight[j, c, tap].
// The flags say that 16-byte accesses are right.
struct Convolution {
  Walk walk;
  const void* source;
  Strides source_strides;
  int channels;
  bool source_vectors;

  const void* weight;
  int64_t weight_column, weight_channel, weight_tap[2];
  bool weight_vectors;
  bool columns_inner, taps_inner;  // the order in which it is read
  bool resident;                   // all of it stays in shared memory
  int teams;                       // of a block's warps: two only with a resident weight

  int columns;
  Strides place;  // the target's pixel (n, h, w) is number n * place.n + ...
  void* target;
  int64_t target_row, target_column;
  bool target_vectors;

  const void* bias;     // kPlain
  Norm norm;            // kForward: of the source, kGradient: of y
  const uint8_t* keep;  // kForward: dropout's, or null
  int64_t keep_row;
  float factor;
  bool statistics;
  const void* y;  // kGradient
  int64_t y_row;
  bool y_vectors;
  // kForward: [mean, m2][column][walker] and [walker] counts; kGradient: [dbeta,
  // dgamma][column][walker]
  float* partials;

  static constexpr auto pointers() {
    return std::array{offsetof(Convolution, source),     offsetof(Convolution, weight),
                      offsetof(Convolution, target),     offsetof(Convolution, bias),
                      offsetof(Convolution, norm.mean),  offsetof(Convolution, norm.var),
                      offsetof(Convolution, norm.gamma), offsetof(Convolution, norm.beta),
                      offsetof(Convolution, keep),       offsetof(Convolution, y),
                      offsetof(Convolution, partials)};
  }
};

// partials[split][tap, j, c] = sum over the split's tiles of dy[pixel, j] * z[pixel + tap, c], with
// z = x or relu(s*x + t).
struct WeightGradient {
  Walk walk;
  const void* source;
  Strides source_strides;
  int channels;
  bool source_vectors;

  const void* dy;
  Strides dy_strides;
  int columns;
  bool dy_vectors;

  int chunks;  // a block's: one or two

  Norm norm;  // mean is null without one
  float* partials;

  static constexpr auto pointers() {
    return std::array{offsetof(WeightGradient, source),     offsetof(WeightGradient, dy),
                      offsetof(WeightGradient, norm.mean),  offsetof(WeightGradient, norm.var),
                      offsetof(WeightGradient, norm.gamma), offsetof(WeightGradient, norm.beta),
                      offsetof(WeightGradient, partials)};
  }
};

// The second step: sums of partials in their order.
struct Reduction {
  const float* weight_partials;  // [split][9, columns, channels]
  int splits, columns, channels;
  float* dweight;  // [columns, channels, 9]

  const float* sums;  // [dbeta, dgamma][channel][walker], or null
  int walkers;
  const float* var;
  float eps;
  float *dbeta, *dgamma;
  int weight_blocks;  // of the grid, the first ones; set by reduce_partials

  static constexpr auto pointers() {
    return std::array{offsetof(Reduction, weight_partials),
                      offsetof(Reduction, dweight),
                      offsetof(Reduction, sums),
                      offsetof(Reduction, var),
                      offsetof(Reduction, dbeta),
                      offsetof(Reduction, dgamma)};
  }
};

// Bytes of a pixel's channels that are staged at a time.
constexpr int kRowBytes = 64;
constexpr int kRowPieces = kRowBytes / 16;
constexpr int kTaps = 9;
constexpr int kWarp = 32;
// Rows of a tile's matrix that a warp multiplies.
constexpr int kWarpPixels = 32;
// Of a block of `convolve`, and of those together on a multiprocessor: as many as the registers
// allow, which are 128 a thread, 168 or 255.
MEMDENSE_BOTH constexpr int max_convolution_threads(int columns, bool tensor_cores) {
  return !tensor_cores ? 256 : columns < 64 ? 512 : 384;
}

// Slots of tables: of the present tile, of the next one, which is being staged, and of the one
// after it, which is being filled in meanwhile.
constexpr int kTables = 3;

// Shared memory of `convolve`, as offsets in bytes: the weight, vectors, and of each team its halo
// (twice), scratch and tables.
struct ConvolutionMemory {
  int vectors, teams, bytes;
  int scratch, sources, targets, places, team;  // from where a team's begins

  static constexpr int kLine = 128;  // of banks

  MEMDENSE_BOTH static constexpr int padded(int columns) { return columns + 8; }

  // What so many bytes leave each team.
  MEMDENSE_BOTH int of_a_team(int all, int teams_count) const {
    return (all - teams) / teams_count / kLine * kLine;
  }

  MEMDENSE_BOTH ConvolutionMemory(int halo, int pixels, int columns, int channels, int value_bytes,
                                  bool resident, int teams_count, Mode mode) {
    const int chunk = kRowBytes / value_bytes, chunks = (channels + chunk - 1) / chunk;
    const int slots = resident ? chunks : 2;
    const int vectors_count = mode == Mode::kForward    ? 2 * chunks * chunk
                              : mode == Mode::kGradient ? 3 * padded(columns)
                                                        : 0;
    vectors = slots * kTaps * columns * kRowBytes;
    teams = (vectors + vectors_count * 4 + kLine - 1) / kLine * kLine;
    scratch = 2 * halo * kRowBytes;
    sources = scratch + pixels / kWarpPixels * 16 * padded(columns) * 4;
    targets = sources + kTables * halo * 8;
    places = targets + kTables * pixels * 8;
    team = (places + kTables * pixels * 4 + kLine - 1) / kLine * kLine;
    bytes = teams + teams_count * team;
  }
};

// Warps of a block of `weight_gradient` whose tiles serve so many chunks of channels: one for each
// of them, each line of taps and each 32 columns.
MEMDENSE_BOTH constexpr int weight_warps(int columns, int chunks) {
  return 3 * chunks * (columns < 64 ? 1 : 2);
}
constexpr int kMaxChunks = 2;

// Such blocks together on a multiprocessor: as many as the registers allow, of 168 a thread.
MEMDENSE_BOTH constexpr int weight_blocks(int columns, int chunks) {
  return 12 / weight_warps(columns, chunks);
}

// Shared memory of `weight_gradient`, likewise.
struct WeightGradientMemory {
  int dy, vectors, sources, targets, places, bytes;

  MEMDENSE_BOTH WeightGradientMemory(int halo, int pixels, int columns, int value_bytes,
                                     int chunks) {
    dy = 2 * chunks * halo * kRowBytes;
    vectors = dy + 2 * pixels * columns * value_bytes;
    sources = vectors + 2 * chunks * kRowBytes / value_bytes * 4;
    targets = sources + kTables * halo * 8;
    places = targets + kTables * pixels * 8;
    bytes = places + kTables * pixels * 4;
  }
};

// mean and biased variance of each column from kForward's partials.
struct Merge {
  const float* partials;
  int columns, walkers;
  float *mean, *var;

  static constexpr auto pointers() {
    return std::array{offsetof(Merge, partials), offsetof(Merge, mean), offsetof(Merge, var)};
  }
};

// Chan's formula: the values of `b` after those of `a`.
template <typename T>
MEMDENSE_DEVICE void merge(T& count, T& mean, T& m2, T b_count, T b_mean, T b_m2) {
  if (b_count == T(0)) return;
  const T total = count + b_count, delta = b_mean - mean, share = b_count / total;
  m2 += b_m2 + delta * delta * count * share;
  mean += delta * share;
  count = total;
}

// Types of values, with a translation unit each (float has two).
struct HalfKind;
struct BFloat16Kind;
struct Tf32Kind;
struct FloatKind;

// Launchers. `columns` are those of a block: 16, 32 or 64, the latter not for plain float
// arithmetic.
template <typename K>
void launch_convolution(const Convolution&, Mode, int columns, Grid, device::Stream);
template <typename K>
void launch_weight_gradient(const WeightGradient&, int columns, Grid, device::Stream);
void merge_moments(const Merge&, device::Stream);
void reduce_partials(Reduction, device::Stream);

}  // namespace memdense::conv3x3
