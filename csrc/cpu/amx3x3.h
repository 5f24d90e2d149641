// The dilated 3x3 convolution of stride 1 in float32 on AMX's tiles: conv3x3.h's sums, as products
// of values in three parts (amx.h).
//
// Lines are staged one behind the other, zeros between them, so that a tap of any run of pixels
// begins a fixed distance from it. Outputs, and inputs' gradients, are products of [pixel, channel]
// by [channel, column], tap after tap. For the gradient of the weight, [channel, pixel] by [pixel,
// column], the inputs lie transposed, and a tap moves the outputs' gradients along the pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "conv3x3.h"

namespace memdense {
namespace conv3x3 {

using amx::Half;

// Is this the way for a product of so many channels and columns? Not where half of it is padding,
// or most taps lie beside the image: here they are products with zeros.
inline bool amx_pays(const Geometry& g, int64_t channels, int64_t columns) {
  const auto padded = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  if (!amx::available() || g.stride[0] != 1 || g.stride[1] != 1) return false;
  if (2 * channels * columns < padded(channels, amx::kDepth) * padded(columns, amx::kColumns)) {
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
inline int64_t floats(int64_t halves) { return (halves + 1) / 2; }

// Line y as it lies in memory, or staged in `line`.
template <typename S>
amx::Matrix read_line(const Images<const S>& images, int64_t n, int64_t y, int64_t pixels,
                      int64_t channels, const Reading<float>& read, float* line) {
  if constexpr (std::is_same_v<S, float>) {
    if (images.strides.c == 1) {
      return {images.line(n, y), images.strides.w, pixels, channels, read.scale, read.shift};
    }
  }
  const int64_t stride = pixel_stride<float>(channels);
  memdense::dispatch<StageLine<S, float>>(images.line(n, y), images.strides, pixels, channels, read,
                                          line, stride);
  return {line, stride, pixels, channels};
}

// ---- outputs, or inputs' gradients

// The same walk as conv3x3::Walk.
struct AmxWalk {
  Axis vertical, horizontal;
  int64_t channels, depth;     // depth: in tiles
  Blocks<float> blocks;        // of one or two tiles
  int64_t left, pitch;         // zeros before the first line; pixels from a line to the next
  int64_t tiles, tile_pixels;  // of a line; the last one may begin within the one before
  std::vector<int64_t> places;
  Bands bands;
  int64_t lines;

  AmxWalk(Axis v, Axis h, int64_t channels, int64_t columns, int64_t images, int64_t tasks)
      : vertical(v),
        horizontal(h),
        channels(channels),
        depth((channels + amx::kDepth - 1) / amx::kDepth),
        blocks(columns, 2),
        tiles((h.destination + amx::kRows - 1) / amx::kRows),
        tile_pixels((h.destination + tiles - 1) / tiles) {
    const auto [low, high] = h.reach(0, h.destination);
    left = std::max<int64_t>(0, -low);
    pitch = h.source + std::max(left, high - h.source);
    for (int64_t x = 0; x < h.destination; ++x) places.push_back(x);
    const int64_t line_halves = depth * amx::kParts * pitch * amx::kDepth;
    bands = make_bands(images, vertical, line_halves * sizeof(Half), tasks);
    lines = most_lines(vertical, bands);
  }

  int64_t units() const { return bands.count(); }
  int64_t part_halves() const { return (left + lines * pitch) * amx::kDepth; }
  int64_t result_values() const { return 2 * horizontal.destination * blocks.max_width(); }
  int64_t line_values() const { return horizontal.source * pixel_stride<float>(channels); }
  int64_t scratch_values() const {
    return result_values() + line_values() + floats(depth * amx::kParts * part_halves());
  }

  // ---- weights: [block of columns][32 channels][tap][tile of columns][part]

  int64_t tap_halves(int64_t block) const {
    return blocks.vectors_of(block) * amx::kParts * amx::kTile;
  }
  int64_t weights_of(int64_t block) const {
    return 9 * depth * 2 * block * amx::kParts * amx::kTile;
  }
  int64_t packed_values() const {
    return floats(9 * depth * blocks.vectors * amx::kParts * amx::kTile);
  }

  // of channels [begin, end), begin a multiple of 32
  template <typename S>
  void pack(const Weights<S>& weights, int64_t begin, int64_t end, float* packed) const {
    float taps[amx::kDepth * 9 * 2 * amx::kColumns];
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t width = blocks.width(block);
      for (int64_t c = begin, last; c < end; c = last) {
        last = std::min(end, c + amx::kDepth);
        blocks.gather(weights, c, last, block, taps, 9 * width, width);
        for (int64_t tap = 0; tap < 9; ++tap) {
          Half* to = reinterpret_cast<Half*>(packed) + weights_of(block) +
                     (c / amx::kDepth * 9 + tap) * tap_halves(block);
          amx::split_pairs({taps + tap * width, 9 * width, last - c, width}, amx::kDepth,
                           {to, 0, amx::kParts * amx::kTile, amx::kTile});
        }
      }
    }
  }

  template <typename S, typename Emit>
  void run(int64_t begin, int64_t end, const Images<const S>& source, const Reading<float>& read,
           const float* packed, float* scratch, Emit& emit) const {
    const amx::Configuration configuration(tile_pixels);
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
    Half* staged = reinterpret_cast<Half*>(line + line_values());
    const int64_t low = vertical.reach_inside(band.begin, band.end).first;
    stage(band, source, read, line, staged);
    const int64_t pixels = horizontal.destination;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const Half* weights = reinterpret_cast<const Half*>(packed) + weights_of(block);
      const int64_t width = blocks.width(block);
      for (int64_t y = band.begin, count; y < band.end; y += count) {
        const bool two = tiles == 1 && y + 1 < band.end && inside(y) == inside(y + 1);
        count = two ? 2 : 1;
        run_lines(y, count, block, staged + (left - low * pitch) * amx::kDepth, weights, results);
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

  // [32 channels][part][pixel][channel], pixels of lines with zeros before, between and behind
  template <typename S>
  void stage(const Band& band, const Images<const S>& source, const Reading<float>& read,
             float* line, Half* staged) const {
    const int64_t part = part_halves();
    const auto zeros = [&](int64_t first, int64_t last) {
      for (int64_t i = 0; i < depth * amx::kParts; ++i) {
        std::fill(staged + i * part + first * amx::kDepth, staged + i * part + last * amx::kDepth,
                  Half{0});
      }
    };
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    zeros(0, left);
    for (int64_t y = low; y < high; ++y) {
      const int64_t first = left + (y - low) * pitch;
      amx::split_rows(read_line(source, band.n, y, horizontal.source, channels, read, line),
                      {staged + first * amx::kDepth, amx::kParts * part, part});
      zeros(first + horizontal.source, first + pitch);
    }
  }

  // Line y in pairs of tiles, or the lines y and y + 1 of one tile each.
  void run_lines(int64_t y, int64_t count, int64_t block, const Half* staged, const Half* weights,
                 float* results) const {
    const int64_t width = blocks.width(block), part = part_halves();
    for (int64_t tile = 0, taken; tile < tiles; tile += taken) {
      taken = std::min<int64_t>(2, tiles - tile);
      const int64_t x = tile_start(tile), next = tile_start(tile + taken - 1);
      amx::Segment taps[9];
      int64_t used = 0;
      for (const Tap& row : vertical.phases[0].tap) {
        if (y < row.first || y >= row.last) continue;
        for (const Tap& column : horizontal.phases[0].tap) {
          if (column.first >= next + tile_pixels || x >= column.last) continue;
          const int64_t from = (y + row.shift) * pitch + x + column.shift;
          taps[used++] = {staged + from * amx::kDepth,
                          weights + (row.index * 3 + column.index) * tap_halves(block)};
        }
      }
      amx::multiply(std::max(taken, count), blocks.vectors_of(block),
                    {.segments = taps,
                     .count = used,
                     .length = depth,
                     .a_row = amx::kDepth,
                     .a_tile = (count == 2 ? pitch : next - x) * amx::kDepth,
                     .a_part = part,
                     .a_step = amx::kParts * part,
                     .b_tile = amx::kParts * amx::kTile,
                     .b_part = amx::kTile,
                     .b_step = 9 * tap_halves(block),
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
  int64_t tiles;              // of c
  Blocks<float> blocks;       // of j
  int64_t before, behind;     // pixels of zeros around dy's lines
  int64_t pitch;              // pixels from a line to the next, of both
  int64_t group;              // lines that are transposed at a time
  Bands bands;
  int64_t z_row, dy_pixels;  // of a channel

  static constexpr int64_t kChunk = 16;  // tiles of pixels whose z and dy stay in L1
  static constexpr int64_t kGroup = 64;  // pixels

  AmxWeightWalk(const Geometry& g, int64_t tasks)
      : g(g),
        vertical(Axis::backward(g, 0)),
        horizontal(Axis::backward(g, 1)),
        tiles((g.c + amx::kRows - 1) / amx::kRows),
        blocks(g.k, 2) {
    const auto [low, high] = horizontal.reach(0, g.in[1]);
    const int64_t left = even(std::max<int64_t>(0, -low));
    pitch = even(std::max({g.out[1] + left, high, g.in[1]}));
    before = amx::kDepth + left;
    behind = amx::kDepth + even(std::max<int64_t>(0, high - g.in[1]));
    group = std::max<int64_t>(1, kGroup / pitch);
    bands = make_bands(g.n, vertical,
                       pitch * (tiles * amx::kRows + 2 * blocks.padded()) * amx::kParts *
                           static_cast<int64_t>(sizeof(Half)),
                       tasks);
    // an odd number of cache lines: rows fall into different sets
    z_row = ((deep(bands.lines * pitch) + 1) | 1) * amx::kDepth;
    dy_pixels = before + most_lines(vertical, bands) * pitch + behind;
  }

  int64_t units() const { return bands.count(); }
  int64_t pixels_of_unit() const { return bands.lines * g.in[1]; }
  int64_t tap_values() const { return tiles * amx::kRows * blocks.padded(); }
  int64_t partial_values() const { return 9 * tap_values(); }
  int64_t line_values() const {
    return std::max(std::min(group, bands.lines) * pitch * pixel_stride<float>(g.c),
                    g.out[1] * pixel_stride<float>(g.k));
  }
  int64_t z_part() const { return tiles * amx::kRows * z_row; }
  int64_t dy_tile() const { return dy_pixels * amx::kColumns; }
  int64_t dy_part() const { return blocks.vectors * dy_tile(); }
  int64_t scratch_values() const {
    return line_values() + floats(amx::kParts * (z_part() + 2 * dy_part()));
  }

  // Are there so many sums that they do not stay in L2?
  bool wide() const { return partial_values() * sizeof(float) > kSharedBytes; }

  // Bands [begin, end)
  template <typename S>
  void run(int64_t begin, int64_t end, const Images<const S>& dy, const Images<const S>& x,
           const Reading<float>& read, float* scratch, float* partial) const {
    const amx::Configuration configuration(amx::kRows);
    Half* z = reinterpret_cast<Half*>(scratch + line_values());
    Half* d = z + amx::kParts * z_part();
    for (int64_t i = begin; i < end; ++i) {
      stage_z(bands[i], x, read, scratch, z);
      stage_dy(bands[i], dy, scratch, d);
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
  static int64_t even(int64_t n) { return n + n % 2; }
  static int64_t deep(int64_t pixels) { return (pixels + amx::kDepth - 1) / amx::kDepth; }

  // [part][c][pixel]
  template <typename S>
  void stage_z(const Band& band, const Images<const S>& x, const Reading<float>& read, float* lines,
               Half* z) const {
    const int64_t stride = pixel_stride<float>(g.c);
    for (int64_t y = band.begin, last; y < band.end; y = last) {
      last = std::min(y + group, band.end);
      const int64_t first = (y - band.begin) * pitch, pixels = (last - y) * pitch;
      const int64_t padded = last < band.end ? pixels : deep(first + pixels) * amx::kDepth - first;
      amx::Matrix from{lines, stride, pixels, g.c};
      if (last - y == 1) {
        from = read_line(x, band.n, y, g.in[1], g.c, read, lines);
      } else {
        for (int64_t i = y; i < last; ++i) {
          float* line = lines + (i - y) * pitch * stride;
          memdense::dispatch<StageLine<S, float>>(x.line(band.n, i), x.strides, g.in[1], g.c, read,
                                                  line, stride);
          std::fill(line + g.in[1] * stride, line + pitch * stride, 0.f);
        }
      }
      amx::split_transposed(from, padded, {z + first, z_row, z_part()});
    }
  }

  // [even, odd first pixels][part][tile of j][pair of pixels][j], with zeros before, between and
  // behind the lines
  template <typename S>
  void stage_dy(const Band& band, const Images<const S>& dy, float* line, Half* d) const {
    const auto zeros = [&](int64_t first, int64_t pixels) {
      for (int64_t tile = 0; tile < amx::kParts * blocks.vectors; ++tile) {
        std::fill_n(d + tile * dy_tile() + first * amx::kColumns, pixels * amx::kColumns, Half{0});
      }
    };
    zeros(0, before);
    const auto [low, high] = vertical.reach_inside(band.begin, band.end);
    for (int64_t y = low; y < high; ++y) {
      amx::split_pairs(read_line(dy, band.n, y, g.out[1], g.k, {}, line), pitch,
                       {d, amx::kTile, dy_tile(), dy_part(), before + (y - low) * pitch});
    }
    zeros(before + (high - low) * pitch, behind);
    if (odd_taps()) {
      const int64_t all = amx::kParts * dy_part();
      amx::shift_pairs(d, all / amx::kDepth, d + all);
    }
  }

  bool odd_taps() const {
    const auto odd = [](const Tap& tap) { return tap.shift % 2 != 0; };
    return std::ranges::any_of(horizontal.phases[0].tap, odd);
  }

  void run_band(const Band& band, const Half* z, const Half* d, float* partial) const {
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
            const int64_t pixel =
                before + from * amx::kDepth + column.shift + (band.begin + row.shift - low) * pitch;
            const int64_t tap = row.index * 3 + column.index;
            run_tap(taken, to - from, z + tile * amx::kRows * z_row + from * amx::kDepth,
                    d + pixel % 2 * amx::kParts * dy_part() + pixel / 2 * 2 * amx::kColumns,
                    partial + tap * tap_values() + tile * amx::kRows * blocks.padded());
          }
        }
      }
    }
  }

  void run_tap(int64_t taken, int64_t length, const Half* z, const Half* d, float* out) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const amx::Segment segment{z, d + 2 * block * dy_tile()};
      amx::multiply(taken, blocks.vectors_of(block),
                    {.segments = &segment,
                     .count = 1,
                     .length = length,
                     .a_row = z_row,
                     .a_tile = amx::kRows * z_row,
                     .a_part = z_part(),
                     .a_step = amx::kDepth,
                     .b_tile = dy_tile(),
                     .b_part = dy_part(),
                     .b_step = amx::kTile,
                     .out = out + blocks.start(block),
                     .out_row = blocks.padded(),
                     .out_tile = amx::kRows * blocks.padded(),
                     .accumulate = true});
    }
  }
};

}  // namespace conv3x3
}  // namespace memdense
