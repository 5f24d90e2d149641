// Dilated 3x3 convolution of images whose channels are the fastest axis, in plain C++.
//
//   out[n, y, x, j] = sum over ky, kx, c of z[n, y*stride + ky*dilation - padding, (x alike), c]
//                                          * weight[j, c, ky, kx]
//
// with z = relu(scale * input + shift), or the input itself, and z = 0 outside of the image.
// A task stages a band of lines of z in scratch that stays in its core's L2, each value once and
// each line between zero columns; then every tap of a tile of outputs is one segment of a single
// register-blocked product (tile.h). The gradient of z is the same walk over the output's
// gradient, one phase of pixels (y mod stride, x mod stride) at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "../conv3x3_geometry.h"
#include "norm.h"
#include "statistics.h"
#include "tile.h"
#include "vector.h"

namespace memdense {
namespace conv3x3 {

constexpr int64_t kBandBytes = 768 << 10;  // of staged lines: they stay in a core's L2
constexpr int64_t kMinPiece = 4;           // pixels: narrower tiles waste more than their taps
constexpr int64_t kGroupPixels = 128;      // that a weight gradient adds up in registers

// Strides of images, in values.
struct Strides {
  int64_t n, c, h, w;
};

template <typename S>
struct Images {
  S* data;
  Strides strides;
  S* line(int64_t n, int64_t h) const { return data + n * strides.n + h * strides.h; }
};

// Weights as a walk reads them, by the strides of its channels, columns and taps.
template <typename S>
struct Weights {
  const S* data;
  int64_t channel, column, taps[2];

  Weights turned() const {
    return {data + 2 * (taps[0] + taps[1]), channel, column, {-taps[0], -taps[1]}};
  }
  const S& at(int64_t r, int64_t tap, int64_t j) const {
    return data[r * channel + tap / 3 * taps[0] + tap % 3 * taps[1] + j * column];
  }
};

// Channels [begin, end) of `count` columns of weights, in one of the layouts that `fits` names:
// out[channel][tap][column]
template <typename T>
struct Gather {
  Weights<T> weights;
  int64_t begin, end, first, count;
  T* out;
  int64_t out_channel, out_tap;

  // Does memory run along columns, along channels or along the nine taps, one way or the other?
  static bool fits(const Weights<T>& w) {
    return w.column == 1 || w.channel == 1 ||
           (w.taps[0] == 3 * w.taps[1] && (w.taps[1] == 1 || w.taps[1] == -1));
  }

  template <int kBytes>
  static MEMDENSE_INLINE void run(const Gather& a) {
    constexpr int kBytesOf8 = std::min<int>(kBytes, 8 * sizeof(T));
    const Weights<T>& w = a.weights;
    const auto transposed = [](const T* from, int64_t column, int64_t rows, int64_t columns, T* out,
                               int64_t out_row) MEMDENSE_INLINE_LAMBDA {
      if constexpr (std::is_same_v<T, BFloat16>)
        transpose<uint16_t, kBytesOf8>(&from->bits, column, rows, columns, &out->bits, out_row);
      else
        transpose<T, kBytesOf8>(from, column, rows, columns, out, out_row);
    };
    if (w.column == 1) {
      for (int64_t r = a.begin; r < a.end; ++r) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          std::copy_n(&w.at(r, tap, a.first), a.count,
                      a.out + (r - a.begin) * a.out_channel + tap * a.out_tap);
        }
      }
    } else if (w.channel == 1) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        transposed(&w.at(a.begin, tap, a.first), w.column, a.end - a.begin, a.count,
                   a.out + tap * a.out_tap, a.out_channel);
      }
    } else {
      const int64_t last = w.taps[1] < 0 ? 8 : 0;  // the tap that is first in memory
      for (int64_t r = a.begin; r < a.end; ++r) {
        transposed(&w.at(r, last, a.first), w.column, 9, a.count,
                   a.out + (r - a.begin) * a.out_channel + last * a.out_tap, w.taps[1] * a.out_tap);
      }
    }
  }
};

// How a BatchNorm is read: z = relu(scale * x + shift); no vectors, no reading: z = x.
template <typename T>
struct Reading {
  const T* scale;
  const T* shift;
};

// ---- one axis of the walk

// Tap `index` of three; of its phase's destinations, [first, last) read inside the image by it.
struct Tap {
  int64_t index, shift, first, last;
  bool reads() const { return first < last; }
};

// Destinations first, first + step, ... `count` of them; the j-th reads source j * step + shift.
struct Phase {
  int64_t first, count;
  int taps;
  Tap tap[3];
};

struct Axis {
  int64_t source, destination;            // lengths
  int64_t source_step, destination_step;  // from one destination of a phase to the next
  std::vector<Phase> phases;  // as many as destination_step, or as there are destinations

  static Axis forward(const Geometry& g, int a) {
    Axis axis{g.in[a], g.out[a], g.stride[a], 1, {{0, g.out[a], 0, {}}}};
    for (int64_t k = 0; k < 3; ++k) axis.add_tap(0, k, k * g.dilation[a] - g.padding[a]);
    return axis;
  }

  // input y = output * stride + k * dilation - padding, solved for output
  static Axis backward(const Geometry& g, int a) {
    Axis axis{g.out[a], g.in[a], 1, g.stride[a], {}};
    for (int64_t first = 0; first < std::min(g.stride[a], g.in[a]); ++first) {
      axis.phases.push_back({first, (g.in[a] - first + g.stride[a] - 1) / g.stride[a], 0, {}});
      for (int64_t k = 0; k < 3; ++k) {
        const int64_t reached = first + g.padding[a] - k * g.dilation[a];
        if (reached % g.stride[a] == 0) axis.add_tap(first, k, reached / g.stride[a]);
      }
    }
    return axis;
  }

  void add_tap(int64_t phase, int64_t index, int64_t shift) {
    Phase& p = phases[phase];
    const int64_t first = std::max<int64_t>(0, (-shift + source_step - 1) / source_step);
    const int64_t last = std::min(p.count, (source - shift + source_step - 1) / source_step);
    p.tap[p.taps++] = {index, shift, first, last};
  }

  // How many pairs of a destination and a tap read inside.
  int64_t inside() const {
    int64_t pairs = 0;
    for (const Phase& phase : phases) {
      for (int t = 0; t < phase.taps; ++t) {
        pairs += std::max<int64_t>(0, phase.tap[t].last - phase.tap[t].first);
      }
    }
    return pairs;
  }

  // The sources that destinations [begin, end) touch, also beyond the edges, by taps that read
  // inside: [first, second).
  std::pair<int64_t, int64_t> reach(int64_t begin, int64_t end) const {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const Phase& phase : phases) {
      const int64_t j0 = (begin - phase.first + destination_step - 1) / destination_step;
      const int64_t j1 = (end - 1 - phase.first + destination_step) / destination_step - 1;
      for (int t = 0; t < phase.taps && std::max<int64_t>(j0, 0) <= j1; ++t) {
        if (!phase.tap[t].reads()) continue;
        low = std::min(low, std::max<int64_t>(j0, 0) * source_step + phase.tap[t].shift);
        high = std::max(high, j1 * source_step + phase.tap[t].shift + 1);
      }
    }
    return low < high ? std::pair{low, high} : std::pair<int64_t, int64_t>{0, 0};
  }

  std::pair<int64_t, int64_t> reach_inside(int64_t begin, int64_t end) const {
    const auto [low, high] = reach(begin, end);
    const int64_t first = std::clamp<int64_t>(low, 0, source);
    return {first, std::clamp(high, first, source)};
  }
};

// ---- columns in blocks of as many vectors as a tile is wide

template <typename T>
struct Blocks {
  const TileKernels<T>& kernels;
  int lanes;
  int64_t columns, vectors, count;

  // `most` vectors in a block
  explicit Blocks(int64_t columns, int most = tile_kernels<T>().max_vectors)
      : kernels(tile_kernels<T>()),
        lanes(kernels.lanes),
        columns(columns),
        vectors(pieces(columns, lanes)),
        // two vectors each; a last odd one joins the block before it where registers allow
        count(std::max<int64_t>(1, (vectors + 3 - most) / 2)) {}

  int64_t start(int64_t block) const { return block * 2 * lanes; }
  int vectors_of(int64_t block) const {
    return static_cast<int>(block + 1 < count ? 2 : vectors - 2 * block);
  }
  int max_rows(int64_t block) const { return kernels.max_rows[vectors_of(block)]; }
  int64_t width(int64_t block) const { return vectors_of(block) * lanes; }
  int64_t columns_of(int64_t block) const { return std::min(width(block), columns - start(block)); }
  int64_t max_width() const { return std::max(width(0), width(count - 1)); }
  int64_t padded() const { return vectors * lanes; }

  // Channels [begin, end) of a block's weights, columns padded with zeros, to
  // out[channel][tap][column] by the strides given.
  template <typename S, typename O>
  void gather(const Weights<S>& w, int64_t begin, int64_t end, int64_t block, O* out,
              int64_t out_channel, int64_t out_tap) const {
    const int64_t real = columns_of(block), first = start(block);
    for (int64_t i = 0; real < width(block) && i < 9 * (end - begin); ++i) {
      O* row = out + i / 9 * out_channel + i % 9 * out_tap;
      std::fill(row + real, row + width(block), O{});
    }
    if constexpr (std::is_same_v<S, O>) {
      if (Gather<O>::fits(w)) {
        memdense::dispatch<Gather<O>>(
            Gather<O>{w, begin, end, first, real, out, out_channel, out_tap});
        return;
      }
    }
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        O* to = out + (r - begin) * out_channel + tap * out_tap;
        for (int64_t j = 0; j < real; ++j) {
          const S& value = w.at(r, tap, first + j);
          if constexpr (std::is_same_v<S, O>)
            to[j] = value;
          else
            to[j] = load(value);
        }
      }
    }
  }
};

// Values from one staged pixel to the next: whole vectors, and not a multiple of what would send
// all pixels to one set of the cache.
template <typename T>
int64_t pixel_stride(int64_t channels) {
  const Blocks<T> blocks(channels);
  return (blocks.vectors % 16 == 0 ? blocks.vectors + 1 : blocks.vectors) * blocks.lanes;
}

// ---- loops over values: reading, storing, answering

template <typename T>
inline T relu(T value) {
  return value < 0 ? T{0} : value;  // NaN stays
}

// z of `pixels` pixels of a line, to [pixel][stride]; the channels that pad a vector become 0.
template <typename S, typename T>
struct StageLine {
  template <int>
  static MEMDENSE_INLINE void run(const S* x, const Strides& strides, int64_t pixels,
                                  int64_t channels, const Reading<T>& read, T* z, int64_t stride) {
    if (strides.c != 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const T scale = read.scale ? read.scale[c] : T{1};
        const T shift = read.scale ? read.shift[c] : T{0};
        for (int64_t p = 0; p < pixels; ++p) {
          const T value = load(x[c * strides.c + p * strides.w]);
          z[p * stride + c] = read.scale ? relu(value * scale + shift) : value;
        }
      }
      for (int64_t p = 0; p < pixels; ++p)
        std::fill(z + p * stride + channels, z + (p + 1) * stride, T{0});
      return;
    }
    const int64_t step = strides.w;
    const T *scale = read.scale, *shift = read.shift;
    for (int64_t p = 0; p < pixels; ++p, x += step, z += stride) {
      if (scale) {
        MEMDENSE_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) z[c] = relu(load(x[c]) * scale[c] + shift[c]);
      } else {
        MEMDENSE_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) z[c] = load(x[c]);
      }
      for (int64_t c = channels; c < stride; ++c) z[c] = T{0};
    }
  }
};

// Results on their way into a line: rows of pixels, columns of channels.
template <typename T>
struct Result {
  T* values;
  int64_t row;  // values from one row to the next
  int64_t rows, columns;
  const int64_t* pixels;  // each row's place in the line
};

// out = (values + bias) * (mask ? factor : 0); bias and mask may be missing. Leaves in values what
// it stored.
template <typename S, typename T>
struct StoreTile {
  template <int>
  static MEMDENSE_INLINE void run(const Result<T>& tile, const S* bias, const bool* mask,
                                  const Strides& mask_strides, T factor, S* out,
                                  const Strides& strides) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      T* __restrict__ values = tile.values + i * tile.row;
      S* __restrict__ to = out + tile.pixels[i] * strides.w;
      if (bias) {
        for (int64_t j = 0; j < tile.columns; ++j) values[j] += load(bias[j]);
      }
      if (mask) {
        const bool* kept = mask + tile.pixels[i] * mask_strides.w;
        for (int64_t j = 0; j < tile.columns; ++j) {
          values[j] *= kept[j * mask_strides.c] ? factor : T{0};
        }
      }
      if (strides.c == 1) {
        __builtin_prefetch(to + tile.columns, 1);  // the next block of channels, which comes soon
        for (int64_t j = 0; j < tile.columns; ++j) store(to[j], values[j]);
      } else {
        for (int64_t j = 0; j < tile.columns; ++j) store(to[j * strides.c], values[j]);
      }
      if constexpr (!std::is_same_v<S, T>) {
        for (int64_t j = 0; j < tile.columns; ++j) values[j] = load(to[j * strides.c]);
      }
    }
  }
};

// dz = values * [scale * x + shift > 0], x_hat = (x - mean) * rstd: dbeta += dz, dgamma += dz *
// x_hat, and out = dz, of which they sum what it stores, or out += scale * dz. Pointers begin at
// the line and the tile's first channel.
template <typename S, typename T>
struct AnswerTile {
  Result<T> tile;
  const S* x;
  int64_t x_row;
  Reader<T> read;
  double *dbeta, *dgamma;
  S* out;
  int64_t out_row;
  bool accumulate;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const AnswerTile& a) {
    for_columns<T, kBytes, 2>(
        0, a.tile.columns, [&]<typename Vec, int kVectors>(int64_t c) MEMDENSE_INLINE_LAMBDA {
          constexpr int64_t kLanes = sizeof(Vec) / sizeof(T);
          Vec scale[kVectors], shift[kVectors], mean[kVectors], sum[kVectors], product[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            scale[v] = memdense::load<Vec>(a.read.scale + c + v * kLanes);
            shift[v] = memdense::load<Vec>(a.read.shift + c + v * kLanes);
            mean[v] = memdense::load<Vec>(a.read.mean + c + v * kLanes);
            sum[v] = product[v] = Vec{};
          }
          for (int64_t i = 0; i < a.tile.rows; ++i) {
            const S* pixel = a.x + a.tile.pixels[i] * a.x_row + c;
            S* to = a.out + a.tile.pixels[i] * a.out_row + c;
            // the next block of channels, which comes soon
            __builtin_prefetch(pixel + a.tile.columns);
            __builtin_prefetch(to + a.tile.columns, 1);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              const Vec value = memdense::load<Vec>(pixel + v * kLanes);
              const Vec z = value * scale[v] + shift[v];
              const Vec da = memdense::load<Vec>(a.tile.values + i * a.tile.row + c + v * kLanes);
              // not "z > 0": where z is NaN, PyTorch lets the gradient pass
              Vec dz = z <= T{0} ? Vec{} : da;
              S* at = to + v * kLanes;
              if (a.accumulate) {
                memdense::store(at, memdense::load<Vec>(at) + scale[v] * dz);
              } else {
                memdense::store(at, dz);
                // whoever takes the sums reads what was stored
                if constexpr (!std::is_same_v<S, T>) dz = memdense::load<Vec>(at);
              }
              sum[v] += dz;
              product[v] += dz * (value - mean[v]);
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            for (int64_t i = 0; i < kLanes; ++i) {
              const int64_t j = c + v * kLanes + i;
              a.dbeta[j] += sum[v][i];
              a.dgamma[j] += static_cast<double>(product[v][i]) * a.read.rstd[j];
            }
          }
        });
  }
};

// ---- the walk

// A band of destination lines of one image.
struct Band {
  int64_t n, begin, end;
};

// Images cut into bands of `lines` lines.
struct Bands {
  int64_t images, height, lines;
  int64_t per_image() const { return (height + lines - 1) / lines; }
  int64_t count() const { return images * per_image(); }
  Band operator[](int64_t i) const {
    const int64_t begin = i % per_image() * lines;
    return {i / per_image(), begin, std::min(begin + lines, height)};
  }
};

// As many lines as keep what a band stages within kBandBytes, and enough bands for all tasks.
inline Bands make_bands(int64_t images, const Axis& vertical, int64_t line_bytes, int64_t tasks) {
  int64_t lines = vertical.destination;
  for (int64_t pieces = 1; lines > 1; ++pieces) {
    lines = (vertical.destination + pieces - 1) / pieces;
    const auto [low, high] = vertical.reach(0, lines);
    const bool fits = std::min(high - low, vertical.source) * line_bytes <= kBandBytes;
    const int64_t count = images * ((vertical.destination + lines - 1) / lines);
    if (fits && (count % tasks == 0 || count >= 4 * tasks)) break;
  }
  return {images, vertical.destination, lines};
}

// The most lines of the source that a band needs.
inline int64_t most_lines(const Axis& vertical, const Bands& bands) {
  int64_t lines = 0;
  for (int64_t begin = 0; begin < bands.height; begin += bands.lines) {
    const auto [low, high] =
        vertical.reach_inside(begin, std::min(begin + bands.lines, bands.height));
    lines = std::max(lines, high - low);
  }
  return lines;
}

// Walks bands of destinations over `channels` source channels and `columns` of packed weights.
template <typename T>
struct Walk {
  Axis vertical, horizontal;
  int64_t channels, stride;  // stride: of staged pixels
  Blocks<T> blocks;
  int64_t left, width;  // zero columns before a staged line; its pixels, zero columns included
  std::vector<int64_t> pixels;  // of a line of destinations, phase by phase
  Bands bands;

  Walk(Axis v, Axis h, int64_t channels, int64_t columns, int64_t images, int64_t tasks)
      : vertical(v),
        horizontal(h),
        channels(channels),
        stride(pixel_stride<T>(channels)),
        blocks(columns) {
    const auto [low, high] = h.reach(0, h.destination);
    left = std::max<int64_t>(0, -low);
    width = left + std::max(high, h.source);
    for (const Phase& phase : h.phases) {
      for (int64_t j = 0; j < phase.count; ++j)
        pixels.push_back(phase.first + j * h.destination_step);
    }
    bands = make_bands(images, vertical, line_values() * sizeof(T), tasks);
  }

  int64_t units() const { return bands.count(); }
  int64_t line_values() const { return width * stride; }
  int64_t result_values() const { return horizontal.phases[0].count * blocks.max_width(); }

  int64_t scratch_values() const {
    return most_lines(vertical, bands) * line_values() + result_values();
  }

  // ---- weights: [block of columns][tap][channel][column], columns padded with zeros

  int64_t packed_values() const { return 9 * channels * blocks.padded(); }

  // of channels [begin, end)
  template <typename S>
  void pack(const Weights<S>& weights, int64_t begin, int64_t end, T* packed) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t width = blocks.width(block);
      blocks.gather(weights, begin, end, block,
                    packed + 9 * channels * blocks.start(block) + begin * width, width,
                    channels * width);
    }
  }

  // Bands [begin, end). emit.results(n, y, block, result) takes each line of one phase;
  // emit.stored(block, values, count) what it left of `count` pixels.
  template <typename S, typename Emit>
  void run(int64_t begin, int64_t end, const Images<const S>& source, const Reading<T>& read,
           const T* packed, T* scratch, Emit& emit) const {
    for (int64_t i = begin; i < end; ++i) {
      run_band(bands[i], source, read, packed, scratch, scratch + result_values(), emit);
    }
  }

 private:
  template <typename S, typename Emit>
  void run_band(const Band& band, const Images<const S>& source, const Reading<T>& read,
                const T* packed, T* results, T* staged, Emit& emit) const {
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    for (int64_t y = low; y < high; ++y) {
      T* line = staged + (y - low) * line_values();
      T* inside = line + left * stride;
      std::fill(line, inside, T{0});
      memdense::dispatch<StageLine<S, T>>(source.line(band.n, y), source.strides, horizontal.source,
                                          channels, read, inside, stride);
      std::fill(inside + horizontal.source * stride, line + line_values(), T{0});
    }
    for (int64_t block = 0; block < blocks.count; ++block) {
      const T* weights = packed + 9 * channels * blocks.start(block);
      for (int64_t y = band.begin; y < band.end; ++y) {
        const Phase& rows = vertical.phases[y % vertical.destination_step];
        const int64_t j = y / vertical.destination_step * vertical.source_step;
        const int64_t* places = pixels.data();
        for (const Phase& columns : horizontal.phases) {
          Segment<T> taps[9];
          int64_t column[9];  // the horizontal tap of each
          int64_t count = 0;
          for (int ty = 0; ty < rows.taps; ++ty) {
            const int64_t line = j + rows.tap[ty].shift;
            if (line < 0 || line >= vertical.source) continue;  // zeros above and below
            for (int tx = 0; tx < columns.taps; ++tx) {
              if (!columns.tap[tx].reads()) continue;  // zeros on both sides
              const int64_t tap = rows.tap[ty].index * 3 + columns.tap[tx].index;
              column[count] = tx;
              taps[count++] = {
                  staged + (line - low) * line_values() + (left + columns.tap[tx].shift) * stride,
                  weights + tap * channels * blocks.width(block)};
            }
          }
          run_line(taps, column, count, columns, block, results);
          emit.results(band.n, y, block,
                       Result<T>{results, blocks.width(block), columns.count,
                                 blocks.columns_of(block), places});
          places += columns.count;
          emit.stored(block, results, columns.count);
        }
      }
    }
  }

  // One line's pixels of one phase, in tiles of about the same size.
  void run_line(const Segment<T> (&taps)[9], const int64_t (&columns)[9], int64_t count,
                const Phase& phase, int64_t block, T* results) const {
    const int64_t step = horizontal.source_step * stride, width = blocks.width(block);
    Segment<T> shifted[9];
    for (int64_t begin = 0, end; begin < phase.count; begin = end) {
      end = piece_end(phase, begin);
      const int64_t tiles = (end - begin + blocks.max_rows(block) - 1) / blocks.max_rows(block);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t x = begin + t * (end - begin) / tiles;
        const int64_t x_end = begin + (t + 1) * (end - begin) / tiles;
        int64_t used = 0;
        for (int64_t s = 0; s < count; ++s) {
          const Tap& tap = phase.tap[columns[s]];
          if (tap.first < x_end && x < tap.last)
            shifted[used++] = {taps[s].a + x * step, taps[s].b};
        }
        blocks.kernels.run(
            static_cast<int>(x_end - x), blocks.vectors_of(block),
            {shifted, used, channels, step, 1, width, results + x * width, width, false});
      }
    }
  }

  // Where the piece of a line that begins at `begin` ends: at the next pixel where a tap enters or
  // leaves the image, if that leaves pieces which are worth it.
  int64_t piece_end(const Phase& phase, int64_t begin) const {
    int64_t end = phase.count;
    for (int t = 0; t < phase.taps; ++t) {
      for (const int64_t cut : {phase.tap[t].first, phase.tap[t].last}) {
        if (cut >= begin + kMinPiece && cut <= phase.count - kMinPiece) end = std::min(end, cut);
      }
    }
    return end;
  }
};

// ---- the weight gradient

// dweight[j, c, ky, kx] += sum over a band's output pixels of dy[pixel, j] * z[pixel + tap, c],
// kept as partial[block of c][tap][j][c]. All channels c of a block stand in a vector, and the
// sums over a few lines in registers.
template <typename T>
struct WeightWalk {
  Geometry g;
  Axis vertical, horizontal;
  Blocks<T> blocks;
  int64_t z_stride, dy_stride;
  Bands bands;

  WeightWalk(const Geometry& g, int64_t tasks)
      : g(g),
        vertical(Axis::forward(g, 0)),
        horizontal(Axis::forward(g, 1)),
        blocks(g.c),
        z_stride(pixel_stride<T>(g.c)),
        dy_stride(pixel_stride<T>(g.k)),
        bands(make_bands(g.n, vertical, (z_line() + dy_line()) * sizeof(T), tasks)) {}

  int64_t units() const { return bands.count(); }
  int64_t pixels_of_unit() const { return bands.lines * g.out[1]; }
  int64_t partial_values() const { return 9 * g.k * blocks.padded(); }
  int64_t z_line() const { return g.in[1] * z_stride; }
  int64_t dy_line() const { return g.out[1] * dy_stride; }

  int64_t scratch_values() const {
    return most_lines(vertical, bands) * z_line() + bands.lines * dy_line();
  }

  // Bands [begin, end)
  template <typename S>
  void run(int64_t begin, int64_t end, const Images<const S>& dy, const Images<const S>& x,
           const Reading<T>& read, T* scratch, T* partial) const {
    for (int64_t i = begin; i < end; ++i) run_band(bands[i], dy, x, read, scratch, partial);
  }

  // dweight[j, c, ky, kx] for j in [begin, end): the tasks' partial sums, added in their order
  void reduce(const T* partials, int64_t partial, int64_t tasks, int64_t begin, int64_t end,
              T* dweight, int64_t dweight_row) const {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t width = blocks.width(block);
        for (int64_t tap = 0; tap < 9; ++tap) {
          const T* from = partials + 9 * g.k * blocks.start(block) + (tap * g.k + j) * width;
          for (int64_t c = 0; c < blocks.columns_of(block); ++c) {
            T sum = from[c];
            for (int64_t t = 1; t < tasks; ++t) sum += from[t * partial + c];
            dweight[j * dweight_row + (blocks.start(block) + c) * 9 + tap] = sum;
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kMaxGroup = 64;

  template <typename S>
  void run_band(const Band& band, const Images<const S>& dy, const Images<const S>& x,
                const Reading<T>& read, T* scratch, T* partial) const {
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    T* z = scratch;
    T* d = scratch + (high - low) * z_line();
    for (int64_t y = low; y < high; ++y) {
      memdense::dispatch<StageLine<S, T>>(x.line(band.n, y), x.strides, g.in[1], g.c, read,
                                          z + (y - low) * z_line(), z_stride);
    }
    for (int64_t y = band.begin; y < band.end; ++y) {
      memdense::dispatch<StageLine<S, T>>(dy.line(band.n, y), dy.strides, g.out[1], g.k,
                                          Reading<T>{}, d + (y - band.begin) * dy_line(),
                                          dy_stride);
    }
    const int64_t group = std::clamp<int64_t>(kGroupPixels / g.out[1], 1, kMaxGroup);
    for (int64_t begin = band.begin; begin < band.end; begin += group) {
      const int64_t end = std::min(begin + group, band.end);
      for (int64_t block = 0; block < blocks.count; ++block) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          T* out = partial + 9 * g.k * blocks.start(block) + tap * g.k * blocks.width(block);
          run_tap(band, begin, end, low, block, tap, z, d, out);
        }
      }
    }
  }

  void run_tap(const Band& band, int64_t begin, int64_t end, int64_t low, int64_t block,
               int64_t tap, const T* z, const T* d, T* out) const {
    const auto [index, shift, first, last] = horizontal.phases[0].tap[tap % 3];
    const int64_t stride = g.stride[1];
    Segment<T> lines[kMaxGroup];
    int64_t count = 0;
    for (int64_t y = begin; y < end && first < last; ++y) {
      const int64_t line = y * g.stride[0] + tap / 3 * g.dilation[0] - g.padding[0];
      if (line < 0 || line >= g.in[0]) continue;
      lines[count++] = {
          d + (y - band.begin) * dy_line() + first * dy_stride,
          z + (line - low) * z_line() + (first * stride + shift) * z_stride + blocks.start(block)};
    }
    if (count == 0) return;
    const int64_t tiles = (g.k + blocks.max_rows(block) - 1) / blocks.max_rows(block);
    const int64_t width = blocks.width(block);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = t * g.k / tiles, j_end = (t + 1) * g.k / tiles;
      Segment<T> shifted[kMaxGroup];
      for (int64_t s = 0; s < count; ++s) shifted[s] = {lines[s].a + j, lines[s].b};
      blocks.kernels.run(static_cast<int>(j_end - j), blocks.vectors_of(block),
                         {shifted, count, last - first, 1, dy_stride, stride * z_stride,
                          out + j * width, width, true});
    }
  }
};

}  // namespace conv3x3
}  // namespace memdense
