// Which tiles, which memory and how many blocks a convolution gets. Host code without torch.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>

#include "conv3x3.h"

namespace memdense::conv3x3 {

inline Axis axis(int64_t out, int64_t in, int64_t stride, int64_t spread, int64_t dilation,
                 int64_t offset) {
  // positions are computed in 32 bits
  constexpr int64_t kLimit = int64_t{1} << 29;
  if (std::max(out, in) > kLimit / std::max(stride, spread) || dilation > kLimit / 4 ||
      std::abs(offset) > kLimit) {
    throw std::runtime_error("conv3x3: the image, its padding or its dilation is too large");
  }
  return {static_cast<int>(out),
          static_cast<int>(in),
          static_cast<int>(stride),
          static_cast<int>(spread),
          static_cast<int>(dilation),
          static_cast<int>(offset),
          static_cast<int>(std::min(dilation, out)),
          static_cast<int>(quotient_up(out, dilation))};
}

// For numbers below 2^31.
inline Divisor divisor(int64_t value) {
  int shift = 0;
  while (int64_t{1} << shift < value) ++shift;
  const uint64_t factor = (((uint64_t{1} << shift) - value) << 32) / value + 1;
  return {static_cast<int>(value), static_cast<uint32_t>(factor), shift};
}

// Pixels that a tile of `height` by `width` has to stage, at most.
inline int64_t halo_pixels(const Walk& walk, int64_t height, int64_t width) {
  // images that so many lines can touch
  const int64_t images = std::min(height, 1 + quotient_up(height - 1, walk.y.steps));
  const int64_t more = 3 - walk.y.stride;
  const int64_t lines = height * walk.y.stride + (more > 0 ? images : 1) * more;
  return lines * ((width - 1) * walk.x.stride + 3);
}

// The walk whose tiles of at most `pixels` outputs and `max_halo` inputs cost least; without tiles
// where none fits.
inline Walk choose_tiles(int64_t images, const Axis& y, const Axis& x, int pixels,
                         int64_t max_halo) {
  Walk walk{};
  walk.images = static_cast<int>(images);
  walk.y = y;
  walk.x = x;
  walk.pixels = pixels;
  const int64_t lines = images * y.phases * y.steps;
  int64_t least = std::numeric_limits<int64_t>::max();
  constexpr int kTries = 16;
  int64_t last = 0;
  const int64_t fewest = quotient_up(x.steps, pixels);
  for (int64_t parts = fewest; parts <= x.steps; ++parts) {
    if (parts >= fewest + kTries && walk.tiles > 0) break;
    const int64_t width = quotient_up(x.steps, parts);
    if (width == last) continue;
    last = width;
    int64_t height = std::min(pixels / width, lines);
    while (height > 0 && halo_pixels(walk, height, width) > max_halo) --height;
    if (height == 0) continue;
    const int64_t across = x.phases * quotient_up(x.steps, width);
    const int64_t tiles = across * quotient_up(lines, height);
    const int64_t halo = halo_pixels(walk, height, width);
    // the multiplications of a tile and its staging
    const int64_t cost = tiles * (4 * pixels + halo);
    if (cost >= least || lines > std::numeric_limits<int>::max() / 2 ||
        tiles > std::numeric_limits<int>::max() / 2) {
      continue;
    }
    least = cost;
    walk.height = static_cast<int>(height);
    walk.width = static_cast<int>(width);
    walk.halo_width = static_cast<int>((width - 1) * x.stride + 3);
    walk.halo = static_cast<int>(halo);
    walk.across = static_cast<int>(across);
    walk.tiles = static_cast<int>(tiles);
  }
  if (walk.tiles > 0) {
    walk.by_width = divisor(walk.width);
    walk.by_halo_width = divisor(walk.halo_width);
    walk.by_widths = divisor(quotient_up(x.steps, walk.width));
    walk.by_across = divisor(walk.across);
    walk.by_steps = divisor(y.steps);
    walk.by_halo_lines = divisor(y.steps * y.stride + 3 - y.stride);
    walk.by_phases = divisor(y.phases);
  }
  return walk;
}

// A larger halo than this leaves the multiprocessor to one block.
constexpr int kHaloFactor = 3;
// Bytes of shared memory that the system takes of every block.
constexpr int kReserved = 1024;
// Of a grid.
constexpr int kMaxRows = 65535;

// Costs beside `4 * pixels + halo` of a tile, in its unit, some ten cycles: what a team waits for a
// tile, and what a block needs for each channel of a column to begin.
constexpr double kWaiting = 800, kSetup = .2;

// Of a pixel of the halo in shared memory.
constexpr int halo_bytes(int chunks) { return 2 * chunks * kRowBytes + kTables * 8; }

[[noreturn]] inline void refuse_size() {
  throw std::runtime_error(
      "conv3x3: so many channels, or lines so far apart, do not fit into the device's grids or "
      "shared memory");
}

// Tiles whose statistics or sums a team takes one after another, at most: where only summation
// rounds, a longer sum would round more than PyTorch's.
constexpr int64_t most_rounds(bool only_sums_round) {
  return only_sums_round ? 16 : std::numeric_limits<int>::max();
}

struct ConvolutionPlan {
  Walk walk;
  int columns;  // of a block
  bool resident;
  int teams;  // of a block
  Grid grid;
};

// For `columns` outputs of `channels` inputs in values of so many bytes.
inline ConvolutionPlan plan_convolution(int64_t images, const Axis& y, const Axis& x, int channels,
                                        int columns, int value_bytes, bool tensor_cores, Mode mode,
                                        const device::Properties& device) {
  const bool wide = columns > 32 && tensor_cores;
  for (const bool resident : {true, false}) {
    for (const int width : {64, 32, 16}) {
      if (wide ? width == 16 : width != (columns > 16 ? 32 : 16)) continue;
      const int across = static_cast<int>(quotient_up(columns, width));
      // ConvolutionMemory counts in 32 bits
      const int64_t weight = int64_t{kTaps} * width * channels * value_bytes;
      if (across > kMaxRows || (resident && weight > device.shared_per_block)) continue;
      const int max_threads = max_convolution_threads(width, tensor_cores);
      ConvolutionPlan best{};
      double least = std::numeric_limits<double>::max();
      for (const int teams : {1, 2}) {
        if (teams > 1 && !resident) continue;
        for (const int warps : {16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2}) {
          const int pixels = warps * kWarpPixels, threads = teams * warps * kWarp;
          if (threads > max_threads) continue;
          const ConvolutionMemory fixed(0, pixels, width, channels, value_bytes, resident, teams,
                                        mode);
          const int64_t room =
              (fixed.of_a_team(device.shared_per_block, teams) - fixed.team) / halo_bytes(1);
          // without room for the halo of ordinary tiles, less of the weight had better stay
          if (room < pixels * 4 / 3 + 32) continue;
          const int max_halo = static_cast<int>(std::min<int64_t>(room, kHaloFactor * pixels + 64));
          const Walk walk = choose_tiles(images, y, x, pixels, max_halo);
          if (walk.tiles == 0) continue;
          const int bytes = ConvolutionMemory(walk.halo, pixels, width, channels, value_bytes,
                                              resident, teams, mode)
                                .bytes;
          const int fitting =
              std::max(1, std::min(device.shared_per_multiprocessor / (bytes + kReserved),
                                   max_threads / threads));
          const int most = std::max(1, device.multiprocessors * fitting / across);
          const int rounds =
              static_cast<int>(std::min(quotient_up(walk.tiles, most * teams),
                                        most_rounds(!tensor_cores && mode != Mode::kPlain)));
          const int blocks = static_cast<int>(quotient_up(quotient_up(walk.tiles, rounds), teams));
          // the time of the busiest multiprocessor: its teams wait at the same time, but multiply
          // one after another
          const int64_t together = quotient_up(int64_t{blocks} * across, device.multiprocessors);
          const double work = 4. * pixels + walk.halo;
          const double time = rounds * std::max(kWaiting + work, together * teams * work) +
                              together * kSetup * channels * width;
          if (time >= least) continue;
          least = time;
          best = {walk, width, resident, teams, {blocks, across, threads, bytes}};
        }
      }
      if (best.walk.tiles > 0) return best;
    }
  }
  refuse_size();
}

// The same for the weight's gradient, beside `2.5 * pixels + halo` of a tile's chunk, some three
// cycles each: what a block waits for a tile, what for each pixel of its halo, and what a split
// costs for each channel of a column.
constexpr double kWeightWaiting = 200, kHaloWaiting = 3, kSplit = .011;

struct WeightPlan {
  Walk walk;
  int columns, chunks;  // of a block
  Grid grid;            // x: splits
};

inline WeightPlan plan_weight_gradient(int64_t images, const Axis& y, const Axis& x, int channels,
                                       int columns, int value_bytes,
                                       const device::Properties& device) {
  const int width = columns > 32 ? 64 : columns > 16 ? 32 : 16;
  const int all_chunks = static_cast<int>(quotient_up(channels * value_bytes, kRowBytes));
  for (const int chunks : {2, 1}) {
    if (chunks > std::max(1, all_chunks)) continue;
    const int together = weight_blocks(width, chunks);
    const int64_t rows = quotient_up(all_chunks, chunks) * quotient_up(columns, width);
    if (rows > kMaxRows) continue;
    WeightPlan best{};
    double least = std::numeric_limits<double>::max();
    for (const int limit :
         {device.shared_per_multiprocessor / together - kReserved, device.shared_per_block}) {
      for (const int pixels : {256, 192, 128, 64}) {
        const WeightGradientMemory fixed(0, pixels, width, value_bytes, chunks);
        const int64_t room =
            (std::min(limit, device.shared_per_block) - fixed.bytes) / halo_bytes(chunks);
        if (room < pixels * 4 / 3 + 32) continue;
        const int max_halo = static_cast<int>(std::min<int64_t>(room, kHaloFactor * pixels + 64));
        const Walk walk = choose_tiles(images, y, x, pixels, max_halo);
        if (walk.tiles == 0) continue;
        const int bytes = WeightGradientMemory(walk.halo, pixels, width, value_bytes, chunks).bytes;
        const int fitting =
            std::clamp(device.shared_per_multiprocessor / (bytes + kReserved), 1, together);
        const int64_t most = std::max<int64_t>(1, fitting * device.multiprocessors / rows);
        // each split has to write, and somebody to read, a whole dW
        const int64_t rounds = quotient_up(walk.tiles, most);
        const int splits = static_cast<int>(quotient_up(walk.tiles, rounds));
        const int64_t busiest = quotient_up(splits * rows, device.multiprocessors);
        const double work = chunks * (2.5 * pixels + walk.halo);
        const double waiting = kWeightWaiting + kHaloWaiting * walk.halo;
        const double time = rounds * std::max(waiting + work, busiest * work) +
                            splits * kSplit * channels * columns;
        if (time >= least) continue;
        least = time;
        best = {walk, width, chunks, {splits, static_cast<int>(rows), 0, bytes}};
      }
    }
    if (best.walk.tiles > 0) return best;
  }
  refuse_size();
}

}  // namespace memdense::conv3x3
