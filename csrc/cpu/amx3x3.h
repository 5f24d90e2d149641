// The dilated 3x3 convolution of stride 1 in bfloat16 on AMX's tiles: conv3x3.h's sums, of inputs
// that are rounded where they are read through a norm, as PyTorch rounds them.
//
// Lines are staged one behind the other, zeros between them, so that a tap of any run of pixels
// begins a fixed distance from it. Outputs, and inputs' gradients, are products of [pixel, channel]
// by [channel, column], tap after tap. For the gradient of the weight, [channel, pixel] by [pixel,
// column], the inputs lie transposed, and a tap moves the outputs' gradients along the pixels. The
// zeros are multiplied: an infinity at a border becomes NaN by taps that do not read it, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "conv3x3.h"

namespace memdense {
namespace conv3x3 {

// Is this the way for a product of so many channels and columns? Not where half of it is padding,
// or most taps lie beside the image: here they are products with zeros.
inline bool amx_pays(const Geometry& g, int64_t channels, int64_t columns) {
  if (!amx::available() || g.stride[0] != 1 || g.stride[1] != 1) return false;
  if (2 * channels * columns < round_up(channels, amx::kDepth) * round_up(columns, amx::kSide)) {
    return false;
  }
  int64_t inside = 1, all = 1;
  for (int a = 0; a < 2; ++a) {
    inside *= Axis::forward(g, a).inside();
    all *= 3 * g.out[a];
  }
  return 2 * inside > all;
}

// Scratch is counted in floats.
inline int64_t floats(int64_t values) { return pieces(values, 2); }

// z of a line's pixels, to [32 channels][pixel][channel], `block` from 32 channels to the next;
// channels beyond the last are 0.
template <typename S>
struct StageBlocks {
  template <int kBytes>
  static MEMDENSE_INLINE void run(const S* x, int64_t x_row, int64_t pixels, int64_t channels,
                                  const Reading<float>& read, amx::Value* z, int64_t block) {
    const auto at = [&](int64_t p, int64_t c) MEMDENSE_INLINE_LAMBDA {
      return z + c / amx::kDepth * block + p * amx::kDepth + c % amx::kDepth;
    };
    for (int64_t p = 0; p < pixels; ++p, x += x_row) {
      for_columns<float, kBytes, 1>(
          0, channels, [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
            Vec v = load<Vec>(x + c);
            if (read.scale) {
              v = v * load<Vec>(read.scale + c) + load<Vec>(read.shift + c);
              v = v <= 0.0f ? Vec{} : v;  // NaN stays
            }
            store(at(p, c), v);
          });
      for (int64_t c = channels; c % amx::kDepth != 0; ++c) *at(p, c) = {};
    }
  }
};

// Of line y; `line` is room for it where its channels are apart.
template <typename S>
void stage_blocks(const Images<const S>& images, int64_t n, int64_t y, int64_t pixels,
                  int64_t channels, const Reading<float>& read, float* line, amx::Value* to,
                  int64_t block) {
  if (images.strides.c == 1) {
    amx::run<StageBlocks<S>>(images.line(n, y), images.strides.w, pixels, channels, read, to,
                             block);
    return;
  }
  const int64_t stride = pixel_stride<float>(channels);
  memdense::dispatch<StageLine<S, float>>(images.line(n, y), images.strides, pixels, channels, read,
                                          line, stride);
  amx::run<StageBlocks<float>>(line, stride, pixels, channels, Reading<float>{}, to, block);
}

inline void zero_pixels(amx::Value* blocks, int64_t count, int64_t block, int64_t first,
                        int64_t last) {
  for (int64_t i = 0; i < count; ++i) {
    std::fill(blocks + i * block + first * amx::kDepth, blocks + i * block + last * amx::kDepth,
              amx::Value{});
  }
}

// ---- outputs, or inputs' gradients

// The same walk as conv3x3::Walk.
struct AmxWalk {
  Axis vertical, horizontal;
  int64_t channels, depth;  // depth: in steps of 32
  Blocks<float> blocks;
  int64_t left, pitch;         // zeros before the first line; pixels from a line to the next
  int64_t tiles, tile_pixels;  // of a line; the last one may begin within the one before
  std::vector<int64_t> places;
  Bands bands;
  int64_t lines;

  AmxWalk(Axis v, Axis h, int64_t channels, int64_t columns, int64_t images, int64_t tasks)
      : vertical(v),
        horizontal(h),
        channels(channels),
        depth(pieces(channels, amx::kDepth)),
        blocks(columns, 2),
        tiles(pieces(h.destination, amx::kSide)),
        tile_pixels(pieces(h.destination, tiles)) {
    const auto [low, high] = h.reach(0, h.destination);
    left = std::max<int64_t>(0, -low);
    pitch = h.source + std::max(left, high - h.source);
    for (int64_t x = 0; x < h.destination; ++x) places.push_back(x);
    bands = make_bands(images, vertical, depth * pitch * amx::kDepth * sizeof(BFloat16), tasks);
    lines = most_lines(vertical, bands);
  }

  int64_t units() const { return bands.count(); }
  int64_t block_values() const { return (left + lines * pitch) * amx::kDepth; }
  int64_t result_values() const { return 2 * horizontal.destination * blocks.max_width(); }
  int64_t line_values() const { return horizontal.source * pixel_stride<float>(channels); }
  int64_t scratch_values() const {
    return result_values() + line_values() + floats(depth * block_values());
  }

  // ---- weights: [block of columns][32 channels][tap][tile of columns]

  int64_t tap_values(int64_t block) const { return blocks.vectors_of(block) * amx::kTile; }
  int64_t weights_of(int64_t block) const { return 9 * depth * 2 * block * amx::kTile; }
  int64_t packed_values() const { return floats(9 * depth * blocks.vectors * amx::kTile); }

  struct PackTap {
    template <int kBytes>
    static MEMDENSE_INLINE void run(const BFloat16* from, int64_t row, int64_t rows,
                                    int64_t columns, BFloat16* to) {
      amx::pair_rows<kBytes>(from, row, rows, amx::kDepth, columns, to, amx::kTile);
    }
  };

  // of channels [begin, end), begin a multiple of 32
  template <typename S>
  void pack(const Weights<S>& weights, int64_t begin, int64_t end, float* packed) const {
    BFloat16 taps[amx::kDepth * 9 * 2 * amx::kSide];
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t width = blocks.width(block);
      for (int64_t c = begin, last; c < end; c = last) {
        last = std::min(end, c + amx::kDepth);
        blocks.gather(weights, c, last, block, taps, 9 * width, width);
        for (int64_t tap = 0; tap < 9; ++tap) {
          BFloat16* to = reinterpret_cast<BFloat16*>(packed) + weights_of(block) +
                         (c / amx::kDepth * 9 + tap) * tap_values(block);
          amx::run<PackTap>(taps + tap * width, 9 * width, last - c, width, to);
        }
      }
    }
  }

  template <typename S, typename Emit>
  void run(int64_t begin, int64_t end, const Images<const S>& source, const Reading<float>& read,
           const float* packed, float* scratch, Emit& emit) const {
    const amx::Configuration configured(tile_pixels);
    for (int64_t i = begin; i < end; ++i) run_band(bands[i], source, read, packed, scratch, emit);
  }

 private:
  int64_t tile_start(int64_t tile) const {
    return std::min(tile * tile_pixels, horizontal.destination - tile_pixels);
  }

  // Does line y read inside the image by the vertical taps? One bit each.
  int inside(int64_t y) const {
    int found = 0;
    for (int t = 0; t < 3; ++t) {
      const Tap& tap = vertical.phases[0].tap[t];
      if (tap.first <= y && y < tap.last) found |= 1 << t;
    }
    return found;
  }

  template <typename S, typename Emit>
  void run_band(const Band& band, const Images<const S>& source, const Reading<float>& read,
                const float* packed, float* scratch, Emit& emit) const {
    float* results = scratch;
    float* line = results + result_values();
    amx::Value* staged = reinterpret_cast<amx::Value*>(line + line_values());
    const int64_t low = vertical.reach_inside(band.begin, band.end).first;
    stage(band, source, read, line, staged);
    const int64_t pixels = horizontal.destination;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const BFloat16* weights = reinterpret_cast<const BFloat16*>(packed) + weights_of(block);
      const int64_t width = blocks.width(block);
      for (int64_t y = band.begin, count; y < band.end; y += count) {
        const bool two = tiles == 1 && y + 1 < band.end && inside(y) == inside(y + 1);
        count = two ? 2 : 1;
        run_lines(y, count, block, low, staged, weights, results);
        for (int64_t i = 0; i < count; ++i) {
          float* values = results + i * pixels * width;
          emit.results(
              band.n, y + i, block,
              Result<float>{values, width, pixels, blocks.columns_of(block), places.data()});
          emit.stored(block, values, pixels);
        }
      }
    }
  }

  // [32 channels][pixel][channel], pixels of lines with zeros before, between and behind
  template <typename S>
  void stage(const Band& band, const Images<const S>& source, const Reading<float>& read,
             float* line, amx::Value* staged) const {
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    zero_pixels(staged, depth, block_values(), 0, left);
    for (int64_t y = low; y < high; ++y) {
      const int64_t first = left + (y - low) * pitch;
      stage_blocks(source, band.n, y, horizontal.source, channels, read, line,
                   staged + first * amx::kDepth, block_values());
      zero_pixels(staged, depth, block_values(), first + horizontal.source, first + pitch);
    }
  }

  // Line y in pairs of tiles, or the lines y and y + 1 of one tile each.
  void run_lines(int64_t y, int64_t count, int64_t block, int64_t low, const BFloat16* staged,
                 const BFloat16* weights, float* results) const {
    const int64_t width = blocks.width(block);
    for (int64_t tile = 0, taken; tile < tiles; tile += taken) {
      taken = std::min<int64_t>(2, tiles - tile);
      const int64_t x = tile_start(tile), next = tile_start(tile + taken - 1);
      amx::Segment taps[9];
      int64_t used = 0;
      for (const Tap& row : vertical.phases[0].tap) {
        if (y < row.first || y >= row.last) continue;
        for (const Tap& column : horizontal.phases[0].tap) {
          if (column.first >= next + tile_pixels || x >= column.last) continue;
          const int64_t from = left + (y + row.shift - low) * pitch + x + column.shift;
          taps[used++] = {staged + from * amx::kDepth,
                          weights + (row.index * 3 + column.index) * tap_values(block)};
        }
      }
      amx::multiply(std::max(taken, count), blocks.vectors_of(block),
                    {.segments = taps,
                     .count = used,
                     .steps = depth,
                     .a_row = amx::kDepth,
                     .a_tile = (count == 2 ? pitch : next - x) * amx::kDepth,
                     .a_step = block_values(),
                     .b_tile = amx::kTile,
                     .b_step = 9 * tap_values(block),
                     .out = results + x * width,
                     .out_row = width,
                     .out_tile = (count == 2 ? horizontal.destination : next - x) * width,
                     .accumulate = false});
    }
  }
};

// ---- the weight gradient

// dweight[j, c, ky, kx] += sum over a band's input pixels of z[pixel, c] * dy[pixel - tap, j], kept
// as partial[tap][c][j].
struct AmxWeightWalk {
  Geometry g;
  Axis vertical, horizontal;  // from inputs to outputs
  int64_t depth, dy_depth;    // of c and of j in blocks of 32
  int64_t tiles;              // of c
  Blocks<float> blocks;       // of j
  int64_t before, behind;     // pixels of zeros around dy's lines
  int64_t pitch;              // pixels from a line to the next, of both
  int64_t group;              // lines that are transposed at a time
  Bands bands;
  int64_t z_row, dy_pixels;  // of a channel: values of z, padded, and pixels of dy

  static constexpr int64_t kChunk = 16;  // steps of 32 pixels, whose z and dy stay near
  static constexpr int64_t kGroup = 64;  // pixels

  AmxWeightWalk(const Geometry& g, int64_t tasks)
      : g(g),
        vertical(Axis::backward(g, 0)),
        horizontal(Axis::backward(g, 1)),
        depth(deep(g.c)),
        dy_depth(deep(g.k)),
        tiles(pieces(g.c, amx::kSide)),
        blocks(g.k, 2) {
    const auto [low, high] = horizontal.reach(0, g.in[1]);
    const int64_t left = round_up(std::max<int64_t>(0, -low), 2);
    pitch = round_up(std::max({g.out[1] + left, high, g.in[1]}), 2);
    before = amx::kDepth + left;
    behind = amx::kDepth + round_up(std::max<int64_t>(0, high - g.in[1]), 2);
    group = std::max<int64_t>(1, kGroup / pitch);
    bands = make_bands(
        g.n, vertical,
        pitch * (tiles * amx::kSide + 2 * blocks.padded()) * static_cast<int64_t>(sizeof(BFloat16)),
        tasks);
    // an odd number of cache lines: rows fall into different sets
    z_row = ((deep(bands.lines * pitch) + 1) | 1) * amx::kDepth;
    dy_pixels = before + most_lines(vertical, bands) * pitch + behind;
  }

  int64_t units() const { return bands.count(); }
  int64_t pixels_of_unit() const { return bands.lines * g.in[1]; }
  int64_t tap_values() const { return tiles * amx::kSide * blocks.padded(); }
  int64_t partial_values() const { return 9 * tap_values(); }
  int64_t line_values() const {
    return std::max(g.in[1] * pixel_stride<float>(g.c), g.out[1] * pixel_stride<float>(g.k));
  }
  // pixels of a group of lines, and values of 32 channels there
  int64_t group_pixels() const { return round_up(std::min(group, bands.lines) * pitch, 32); }
  int64_t block_values() const { return (group_pixels() + amx::kDepth) * amx::kDepth; }
  int64_t staged_values() const { return std::max(depth, dy_depth) * block_values(); }
  int64_t z_values() const { return tiles * amx::kSide * z_row; }
  int64_t dy_tile() const { return dy_pixels * amx::kSide; }
  int64_t dy_values() const { return blocks.vectors * dy_tile(); }
  int64_t scratch_values() const {
    return line_values() + floats(staged_values() + z_values() + 2 * dy_values());
  }

  // Bands [begin, end)
  template <typename S>
  void run(int64_t begin, int64_t end, const Images<const S>& dy, const Images<const S>& x,
           const Reading<float>& read, float* scratch, float* partial) const {
    const amx::Configuration configured;
    amx::Value* staged = reinterpret_cast<amx::Value*>(scratch + line_values());
    BFloat16* z = staged + staged_values();
    BFloat16* d = z + z_values();
    for (int64_t i = begin; i < end; ++i) {
      stage_z(bands[i], x, read, scratch, staged, z);
      stage_dy(bands[i], dy, scratch, staged, d);
      run_band(bands[i], z, d, partial);
    }
  }

  // dweight[j, c, ky, kx] for j in [begin, end): the tasks' partial sums, added in their order
  void reduce(const float* partials, int64_t partial, int64_t tasks, int64_t begin, int64_t end,
              float* dweight, int64_t dweight_row) const {
    for (int64_t c = 0; c < g.c; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* from = partials + tap * tap_values() + c * blocks.padded();
        for (int64_t j = begin; j < end; ++j) {
          float sum = from[j];
          for (int64_t t = 1; t < tasks; ++t) sum += from[t * partial + j];
          dweight[j * dweight_row + c * 9 + tap] = sum;
        }
      }
    }
  }

 private:
  static int64_t deep(int64_t values) { return pieces(values, amx::kDepth); }

  // [pixel][32 channels], transposed: 32 rows of as many pixels
  struct Transpose {
    template <int kBytes>
    static MEMDENSE_INLINE void run(const BFloat16* from, int64_t pixels, int64_t rows,
                                    BFloat16* out, int64_t out_row) {
      for (int64_t p = 0; p < pixels; p += amx::kDepth) {
        for (int64_t c = 0; c < rows; c += amx::kSide) {
          BFloat16 tile[amx::kTile];
          amx::pair_rows<kBytes>(from + p * amx::kDepth + c, amx::kDepth, amx::kDepth, amx::kDepth,
                                 amx::kSide, tile, 0);
          amx::transpose_pairs<kBytes>(tile);
          for (int64_t i = 0; i < amx::kSide; ++i) {
            std::copy_n(tile + i * amx::kDepth, amx::kDepth, out + (c + i) * out_row + p);
          }
        }
      }
    }
  };

  // [c][pixel]
  template <typename S>
  void stage_z(const Band& band, const Images<const S>& x, const Reading<float>& read, float* line,
               amx::Value* staged, BFloat16* z) const {
    for (int64_t y = band.begin, last; y < band.end; y = last) {
      last = std::min(y + group, band.end);
      const int64_t first = (y - band.begin) * pitch, pixels = (last - y) * pitch;
      for (int64_t i = y; i < last; ++i) {
        const int64_t at = (i - y) * pitch;
        stage_blocks(x, band.n, i, g.in[1], g.c, read, line, staged + at * amx::kDepth,
                     block_values());
        zero_pixels(staged, depth, block_values(), at + g.in[1], at + pitch);
      }
      // what is written beyond a group is written again by the next one
      const int64_t padded =
          last < band.end ? pixels : round_up(first + pixels, amx::kDepth) - first;
      zero_pixels(staged, depth, block_values(), pixels, round_up(padded, amx::kDepth));
      for (int64_t block = 0; block < depth; ++block) {
        const int64_t rows = std::min(amx::kDepth, tiles * amx::kSide - block * amx::kDepth);
        amx::run<Transpose>(staged + block * block_values(), padded, rows,
                            z + block * amx::kDepth * z_row + first, z_row);
      }
    }
  }

  struct Pair {
    template <int kBytes>
    static MEMDENSE_INLINE void run(const BFloat16* from, int64_t rows, int64_t columns,
                                    BFloat16* out, int64_t tile) {
      amx::pair_rows<kBytes>(from, amx::kDepth, rows, rows, columns, out, tile);
    }
  };

  // Pairs of pixels: what was the second of one is the first of the next.
  struct Shift {
    template <int kBytes>
    static MEMDENSE_INLINE void run(const BFloat16* from, int64_t pairs, BFloat16* to) {
      using Long = typename Bits<typename Simd<float, kBytes>::Vec>::Long;
      Long pair = load<Long>(&from->bits);
      for (int64_t i = 0; i < pairs; ++i, to += amx::kDepth) {
        from += amx::kDepth;
        const Long next = i + 1 < pairs ? load<Long>(&from->bits) : Long{};
        memdense::store(&to->bits, pair >> 16 | next << 16);
        pair = next;
      }
    }
  };

  // [even, odd first pixels][tile of j][pair of pixels][j], with zeros before, between and behind
  // the lines
  template <typename S>
  void stage_dy(const Band& band, const Images<const S>& dy, float* line, amx::Value* staged,
                BFloat16* d) const {
    const auto zeros = [&](int64_t first, int64_t pixels) {
      for (int64_t tile = 0; tile < blocks.vectors; ++tile) {
        std::fill_n(d + tile * dy_tile() + first * amx::kSide, pixels * amx::kSide, BFloat16{});
      }
    };
    zeros(0, before);
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    for (int64_t y = low; y < high; ++y) {
      stage_blocks(dy, band.n, y, g.out[1], g.k, {}, line, staged, block_values());
      zero_pixels(staged, dy_depth, block_values(), g.out[1], pitch);
      for (int64_t block = 0; block < dy_depth; ++block) {
        const int64_t columns = std::min(amx::kDepth, blocks.padded() - block * amx::kDepth);
        amx::run<Pair>(staged + block * block_values(), pitch, columns,
                       d + 2 * block * dy_tile() + (before + (y - low) * pitch) * amx::kSide,
                       dy_tile());
      }
    }
    zeros(before + (high - low) * pitch, behind);
    if (odd_taps()) amx::run<Shift>(d, dy_values() / amx::kDepth, d + dy_values());
  }

  bool odd_taps() const {
    const auto odd = [](const Tap& tap) { return tap.shift % 2 != 0; };
    const auto& taps = horizontal.phases[0].tap;
    return std::any_of(std::begin(taps), std::end(taps), odd);
  }

  void run_band(const Band& band, const BFloat16* z, const BFloat16* d, float* partial) const {
    const int64_t low = vertical.reach_inside(band.begin, band.end).first;
    const int64_t all = deep((band.end - band.begin) * pitch);
    for (int64_t chunk = 0; chunk < all; chunk += kChunk) {
      for (int64_t tile = 0, taken; tile < tiles; tile += taken) {
        taken = std::min<int64_t>(2, tiles - tile);
        for (const Tap& row : vertical.phases[0].tap) {
          // pixels that this tap gives a line of dy
          const int64_t first = std::max(row.first, band.begin) - band.begin;
          const int64_t last = std::min(row.last, band.end) - band.begin;
          const int64_t from = std::max(chunk, first * pitch / amx::kDepth);
          const int64_t to = std::min({all, chunk + kChunk, deep(last * pitch)});
          if (first >= last || from >= to) continue;
          for (const Tap& column : horizontal.phases[0].tap) {
            if (!column.reads()) continue;
            const int64_t pixel =
                before + from * amx::kDepth + column.shift + (band.begin + row.shift - low) * pitch;
            const int64_t tap = row.index * 3 + column.index;
            run_tap(taken, to - from, z + tile * amx::kSide * z_row + from * amx::kDepth,
                    d + pixel % 2 * dy_values() + pixel / 2 * 2 * amx::kSide,
                    partial + tap * tap_values() + tile * amx::kSide * blocks.padded());
          }
        }
      }
    }
  }

  void run_tap(int64_t taken, int64_t steps, const BFloat16* z, const BFloat16* d,
               float* out) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const amx::Segment segment{z, d + 2 * block * dy_tile()};
      amx::multiply(taken, blocks.vectors_of(block),
                    {.segments = &segment,
                     .count = 1,
                     .steps = steps,
                     .a_row = z_row,
                     .a_tile = amx::kSide * z_row,
                     .a_step = amx::kDepth,
                     .b_tile = dy_tile(),
                     .b_step = amx::kTile,
                     .out = out + blocks.start(block),
                     .out_row = blocks.padded(),
                     .out_tile = amx::kSide * blocks.padded(),
                     .accumulate = true});
    }
  }
};

}  // namespace conv3x3
}  // namespace memdense
