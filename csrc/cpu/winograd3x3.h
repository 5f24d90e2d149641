// Dilated 3x3 convolution of stride 1 with fewer multiplications (Winograd; Lavin & Gray, 2016).
//
// A pair of outputs, `dilation` apart, reads four inputs d, as far apart. Along one axis
//
//   z = (d0 - d2, d1 + d2, d2 - d1, d3 - d1)               of the inputs
//   u = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)   of the three weights
//   out = (m0 + m1 + m2, m1 - m2 + m3)                     of their products m = z * u
//
// takes 4 multiplications in place of 6, and along both axes a tile of 2x2 outputs takes 16 in
// place of 36: 16 products of matrices, [tile, channel] by [channel, column]. The gradient of the
// weight sums over tiles instead. With the same z,
//
//   u = (e0, (e0 + e1) / 2, (e0 - e1) / 2, e1)             of the outputs' gradients
//   g = (m0 + m1 + m2, m1 - m2, m1 + m2 + m3)              of the sums m of z * u
//
// Where an axis ends in half a pair, its one output is a plain sum of z = (d0, d1, d2) times
// u = (g0, g1, g2): g1 is the fifth of the transformed weights, and e0 * d1 the fifth of the sums.
// Or, where few tiles would share those, a zero stands for d3 and the second output is dropped.
//
// All coefficients are powers of two and no output reads beyond its own taps, so errors stay about
// those of the direct sum, and a NaN goes no further. (An infinity becomes one: it is subtracted
// from itself.) A task takes a chunk of tiles at a time, whose transformed values stay in its
// core's L2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv3x3.h"
#include "vector.h"

namespace memdense {
namespace conv3x3 {
namespace winograd {

constexpr int64_t kChunkBytes = 300 << 10;   // of transformed values, beside weights in L2
constexpr int64_t kSharedBytes = 512 << 10;  // of weights, or sums, that stay in L2 beside others
constexpr int64_t kWeight = 64;              // multiplications that take as long as making a weight
constexpr int64_t kMinTiles = 28, kMinProducts = 1 << 22;  // that are worth the transforms
constexpr int64_t kMinPieces = 3;                          // that share what does not
constexpr int64_t kMinDepth = 24;  // of a product that is added to a sum in memory
constexpr int64_t kSkew = 80;  // values between matrices: their lines fall into other cache sets
constexpr int64_t kPackChannels = 16;  // whose weights are gathered at a time
constexpr int kMaxWidth = 48;          // of a block of columns: three vectors

// ---- tiles

// Outputs `first` and, of two, first + dilation. Half a pair has one, and so may a whole one have
// that is padded.
struct Pair {
  int64_t first;
  int outputs;
  bool whole;
};

// A term of a product: which of z, and which of u.
struct Term {
  int z, u;
};

// Destination y reads sources y - padding + (0, 1, 2) * dilation.
struct PairedAxis {
  int64_t source, destination, dilation, padding;
  std::vector<Pair> pairs;      // phase (y mod dilation) by phase
  std::vector<int64_t> places;  // of a sorted axis: the destinations, in the order of the pairs
  int half_taps = 0;            // of half a pair, as far as any lie inside; 0: there is none

  // `padded`: no halves; `sorted`: two outputs before one
  PairedAxis(int64_t source, int64_t destination, int64_t dilation, int64_t padding, bool padded,
             bool sorted)
      : source(source), destination(destination), dilation(dilation), padding(padding) {
    for (int64_t phase = 0; phase < std::min(dilation, destination); ++phase) {
      for (int64_t y = phase; y < destination; y += 2 * dilation) {
        const bool both = y + dilation < destination;
        pairs.push_back({y, both ? 2 : 1, both || padded});
        if (pairs.back().whole) continue;
        half_taps = std::max(half_taps, source_of(pairs.back(), 2) < source ? 3 : 2);
      }
    }
    if (!sorted) return;
    std::stable_partition(pairs.begin(), pairs.end(), [](const Pair& p) { return p.outputs == 2; });
    for (const Pair& pair : pairs) {
      places.push_back(pair.first);
      if (pair.outputs == 2) places.push_back(pair.first + dilation);
    }
  }

  // Rows stay in the order in which they share lines; columns make long runs of tiles of one kind.
  static PairedAxis forward(const Geometry& g, int a, bool padded) {
    return {g.in[a], g.out[a], g.dilation[a], g.padding[a], padded, a == 1};
  }
  // the same with the weights turned round
  static PairedAxis backward(const Geometry& g, int a, bool padded) {
    return {g.out[a], g.in[a], g.dilation[a], 2 * g.dilation[a] - g.padding[a], padded, a == 1};
  }

  int64_t count() const { return static_cast<int64_t>(pairs.size()); }
  // of pair i's destinations and those behind it
  const int64_t* places_of(int64_t i) const {
    return places.data() + i + std::min(i, static_cast<int64_t>(places.size()) - count());
  }
  int64_t source_of(const Pair& pair, int r) const { return pair.first - padding + r * dilation; }

  // How many u there are; and z, products and terms of each, of whole and half pairs.
  int weights() const { return half_taps ? 5 : 4; }
  int inputs(bool whole) const { return whole ? 4 : half_taps; }
  static constexpr int products(bool whole) { return whole ? 4 : 1; }
  int terms(bool whole) const { return whole ? 1 : half_taps; }
  static Term term(bool whole, int product, int i) {
    return whole ? Term{product, product} : Term{i, i == 1 ? 4 : i == 2 ? 3 : 0};
  }

  // of one image, for each product of channels
  int64_t multiplications() const {
    int64_t sum = 0;
    for (const Pair& pair : pairs) sum += products(pair.whole) * terms(pair.whole);
    return sum;
  }
};

// What there is to do for each product of channels: multiplications of tiles, and weights.
struct Work {
  int64_t multiplications, weights;

  Work(const Geometry& g, bool padded) : multiplications(g.n), weights(1) {
    for (int a = 0; a < 2; ++a) {
      const PairedAxis axis = PairedAxis::forward(g, a, padded);
      multiplications *= axis.multiplications();
      weights *= axis.weights();
    }
  }
  int64_t total() const { return multiplications + kWeight * weights; }
};

// Are halves of pairs worth weights of their own?
inline bool padded(const Geometry& g) { return Work(g, true).total() < Work(g, false).total(); }

// Is this the way for the geometry? Where few taps of a tile lie inside the image, or little work
// shares the transforms, the direct kernel has less to do.
inline bool pays(const Geometry& g) {
  if (g.stride[0] != 1 || g.stride[1] != 1 || g.c < 16 || g.k < 8) return false;
  int64_t direct = g.n, tiles = g.n;
  for (int a = 0; a < 2; ++a) {
    direct *= Axis::forward(g, a).inside();
    tiles *= PairedAxis::forward(g, a, false).count();
  }
  const int64_t here = Work(g, false).multiplications;
  return 4 * direct > 5 * here && tiles >= kMinTiles && here * g.c * g.k >= kMinProducts;
}

// Both ways, is a tile whole or half?
struct Kind {
  bool rows, columns;

  static Kind of(int index) { return {index / 2 == 0, index % 2 == 0}; }
  int index() const { return (rows ? 0 : 2) + (columns ? 0 : 1); }
};

// Tiles of one kind in one line of tiles: columns.pairs[first], columns.pairs[first + 1], ...
struct Run {
  int64_t image;
  Kind kind;
  Pair row;
  int outputs;  // of each column
  int64_t first, count;
  int64_t slot;  // of the first one's transformed values
};

// Hands the tiles [begin, end) of images, each of rows x columns of pairs, to take(run) in runs;
// whenever it took `tiles` of a kind, and at the end, to flush(kind, runs, count).
template <typename Take, typename Flush>
void for_tiles(const PairedAxis& rows, const PairedAxis& columns, int64_t begin, int64_t end,
               int64_t tiles, const Take& take, const Flush& flush) {
  std::vector<Run> runs[4];
  int64_t counts[4] = {};
  const auto flush_kind = [&](int k) {
    if (counts[k] > 0) flush(Kind::of(k), runs[k], counts[k]);
    runs[k].clear();
    counts[k] = 0;
  };
  for (int64_t i = begin; i < end;) {
    const int64_t line = i / columns.count(), first = i % columns.count();
    const Pair &row = rows.pairs[line % rows.count()], &left = columns.pairs[first];
    const Kind kind{row.whole, left.whole};
    const int k = kind.index();
    const int64_t limit = std::min({end - i, columns.count() - first, tiles - counts[k]});
    int64_t count = 1;
    while (count < limit && columns.pairs[first + count].outputs == left.outputs) ++count;
    runs[k].push_back({line / rows.count(), kind, row, left.outputs, first, count, counts[k]});
    take(runs[k].back());
    i += count;
    counts[k] += count;
    if (counts[k] == tiles) flush_kind(k);
  }
  for (int k = 0; k < 4; ++k) flush_kind(k);
}

// As many tiles as fit into `bytes` with `values` in each matrix, a multiple of `rows`; at least
// `least` of them where the `shared` bytes that each chunk reads anew come from beyond L2.
template <typename T>
int64_t chunk_tiles(int64_t bytes, int64_t values, int64_t rows, int64_t shared, int64_t least) {
  const int64_t fit = bytes / (16 * values * static_cast<int64_t>(sizeof(T)));
  return std::max(std::max<int64_t>(1, fit / rows) * rows, shared > kSharedBytes ? least : 1);
}

// Matrices of [row][column] for each block of columns, which are padded with zeros.
template <typename T>
struct Panels {
  Blocks<T> blocks;
  int64_t rows, matrices;

  int64_t size(int64_t block) const { return rows * blocks.width(block) + kSkew; }
  int64_t start(int64_t block) const {
    return matrices * (rows * blocks.start(block) + block * kSkew);
  }
  int64_t values() const { return matrices * (rows * blocks.padded() + blocks.count * kSkew); }
  int64_t bytes() const { return values() * static_cast<int64_t>(sizeof(T)); }
};

// Transformed values of a chunk of each kind of tiles, `of(kind).count` matrices of [tile][value].
struct Matrices {
  int64_t size;      // of one, in values
  int64_t start[5];  // of each kind, and the end

  // count(kind): how many
  template <typename Count>
  Matrices(int64_t size, const Count& count) : size(size), start{} {
    for (int k = 0; k < 4; ++k) start[k + 1] = start[k] + count(Kind::of(k)) * size;
  }
  int64_t values() const { return start[4]; }
  int64_t at(Kind kind, int64_t matrix) const { return start[kind.index()] + matrix * size; }
};

// ---- lines of images

// Pixels of up to four lines.
template <typename T>
struct TilePixels {
  const T* lines[4];  // null beside the image
  const T* zeros;
  int64_t width, step;      // step: values from one pixel to the next
  int64_t first, dilation;  // of the columns that a tile reads, from that of its pair

  const T* at(int line, const Pair& pair, int i) const {
    const int64_t x = pair.first + first + i * dilation;
    return lines[line] && x >= 0 && x < width ? lines[line] + x * step : zeros;
  }
};

// The lines that a row of tiles reads: where the images have them, or else, through BatchNorm and
// ReLU or into order, staged once; the next row of tiles finds two of them again.
template <typename T>
struct Lines {
  int64_t height, width, channels, stride;  // stride: of a staged pixel

  int64_t scratch_values() const { return (4 * width + 1) * stride; }

  struct Held {
    T* data;          // four lines and a pixel of zeros
    int64_t line[4];  // of all images', which is held
  };

  Held hold(T* scratch) const {
    std::fill_n(scratch + 4 * width * stride, stride, T{0});
    return {scratch, {-1, -1, -1, -1}};
  }

  // Can the transforms read the images themselves?
  template <typename S>
  bool plain(const Images<const S>& images, const Reading<T>& read) const {
    return std::is_same_v<S, T> && !read.scale && images.strides.c == 1 &&
           channels % tile_kernels<T>().lanes == 0;
  }

  // channels in whole vectors
  int64_t padded() const {
    const int64_t lanes = tile_kernels<T>().lanes;
    return (channels + lanes - 1) / lanes * lanes;
  }

  // Pixel 0 of line y of an image, the i-th in steps of the dilation; null beside the image.
  template <typename S>
  const T* line(Held& held, const Images<const S>& images, const Reading<T>& read, int64_t n,
                int64_t y, int64_t i) const {
    if (y < 0 || y >= height) return nullptr;
    if constexpr (std::is_same_v<S, T>) {
      if (plain(images, read)) return images.line(n, y);
    }
    T* line = held.data + i % 4 * width * stride;
    if (held.line[i % 4] != n * height + y) {
      memdense::dispatch<StageLine<S, T>>(images.line(n, y), images.strides, width, channels, read,
                                          line, stride);
      held.line[i % 4] = n * height + y;
    }
    return line;
  }

  // `count` lines of a run's tiles, `up` above and `left` of where its pairs begin.
  template <typename S>
  TilePixels<T> pixels(Held& held, const Images<const S>& images, const Reading<T>& read,
                       const Run& run, int count, const PairedAxis& rows, int64_t up,
                       const PairedAxis& columns, int64_t left) const {
    TilePixels<T> found{{},    held.data + 4 * width * stride,
                        width, plain(images, read) ? images.strides.w : stride,
                        -left, columns.dilation};
    for (int r = 0; r < count; ++r) {
      found.lines[r] = line(held, images, read, run.image, run.row.first - up + r * rows.dilation,
                            run.row.first / rows.dilation + r);
    }
    return found;
  }
};

// ---- transforms of vectors of channels

template <bool kWhole, typename V>
MEMDENSE_INLINE void inputs(const V (&d)[4], V (&z)[4]) {
  if constexpr (kWhole) {
    z[0] = d[0] - d[2];
    z[1] = d[1] + d[2];
    z[2] = d[2] - d[1];
    z[3] = d[3] - d[1];
  } else {
    for (int i = 0; i < 3; ++i) z[i] = d[i];
  }
}

template <typename V>
MEMDENSE_INLINE void weights(const V& g0, const V& g1, const V& g2, V (&u)[5]) {
  const V half = (g0 + g2) * 0.5, middle = g1 * 0.5;
  u[0] = g0;
  u[1] = half + middle;
  u[2] = half - middle;
  u[3] = g2;
  u[4] = g1;
}

template <bool kWhole, typename V>
MEMDENSE_INLINE void gradients(const V (&e)[2], V (&u)[4]) {
  u[0] = e[0];
  if constexpr (kWhole) {
    constexpr auto half = decltype(e[0][0] + 0)(0.5);
    u[1] = (e[0] + e[1]) * half;
    u[2] = (e[0] - e[1]) * half;
    u[3] = e[1];
  }
}

template <bool kWhole, typename V>
MEMDENSE_INLINE void outputs(const V (&m)[4], V (&out)[2]) {
  if constexpr (kWhole) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] + m[3];
  } else {
    out[0] = m[0];
  }
}

template <typename V>
MEMDENSE_INLINE void sums(const V (&m)[5], V (&g)[3]) {
  const V both = m[1] + m[2];
  g[0] = m[0] + both;
  g[1] = (m[1] - m[2]) + m[4];
  g[2] = both + m[3];
}

// Kernel::tiles<kBytes, whole rows, whole columns>(work)
template <typename Kernel>
struct OfKind {
  template <int kBytes>
  static MEMDENSE_INLINE void run(const Kernel& work, Kind kind) {
    if (kind.rows) {
      kind.columns ? Kernel::template tiles<kBytes, true, true>(work)
                   : Kernel::template tiles<kBytes, true, false>(work);
    } else {
      kind.columns ? Kernel::template tiles<kBytes, false, true>(work)
                   : Kernel::template tiles<kBytes, false, false>(work);
    }
  }
};

// z of `count` tiles: out[row][column][tile][channel]
template <typename T>
struct TransformInputs {
  TilePixels<T> pixels;
  int rows, columns;  // of z
  const Pair* pairs;  // the tiles' columns
  int64_t count, channels;
  T* out;
  int64_t out_tile, out_matrix;

  template <int kBytes, bool kRows, bool kColumns>
  static MEMDENSE_INLINE void tiles(const TransformInputs& a) {
    constexpr int kR = kRows ? 4 : 3, kS = kColumns ? 4 : 3;  // of half pairs 2 may do
    const int kept = kColumns ? 4 : a.columns;
    for (int64_t tile = 0; tile < a.count; ++tile) {
      const T* from[4][4];
      for (int r = 0; r < kR; ++r) {
        for (int s = 0; s < kS; ++s) from[r][s] = a.pixels.at(r, a.pairs[tile], s);
      }
      T* to = a.out + tile * a.out_tile;
      for_columns<T, kBytes, 1>(0, a.channels,
                                [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
                                  Vec d[4], columns[4][4], z[4];
#pragma GCC unroll 4
                                  for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 4
                                    for (int r = 0; r < kR; ++r) d[r] = load<Vec>(from[r][s] + c);
                                    inputs<kRows>(d, columns[s]);
                                  }
#pragma GCC unroll 4
                                  for (int r = 0; r < kR; ++r) {
                                    if (!kRows && r >= a.rows) continue;
#pragma GCC unroll 4
                                    for (int s = 0; s < kS; ++s) d[s] = columns[s][r];
                                    inputs<kColumns>(d, z);
#pragma GCC unroll 4
                                    for (int s = 0; s < kS; ++s) {
                                      if (kColumns || s < kept)
                                        store(to + (r * kept + s) * a.out_matrix + c, z[s]);
                                    }
                                  }
                                });
    }
  }
};

// u of the gradients of `count` tiles, likewise
template <typename T>
struct TransformGradients {
  TilePixels<T> pixels;
  const Pair* pairs;
  int64_t count, channels;
  T* out;
  int64_t out_tile, out_matrix;

  template <int kBytes, bool kRows, bool kColumns>
  static MEMDENSE_INLINE void tiles(const TransformGradients& a) {
    constexpr int kI = kRows ? 2 : 1, kJ = kColumns ? 2 : 1;
    constexpr int kR = PairedAxis::products(kRows), kS = PairedAxis::products(kColumns);
    for (int64_t tile = 0; tile < a.count; ++tile) {
      const T* from[2][2];
      for (int i = 0; i < kI; ++i) {
        for (int j = 0; j < kJ; ++j) from[i][j] = a.pixels.at(i, a.pairs[tile], j);
      }
      T* to = a.out + tile * a.out_tile;
      for_columns<T, kBytes, 1>(0, a.channels,
                                [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
                                  Vec e[2], columns[2][4], u[4];
#pragma GCC unroll 2
                                  for (int j = 0; j < kJ; ++j) {
#pragma GCC unroll 2
                                    for (int i = 0; i < kI; ++i) e[i] = load<Vec>(from[i][j] + c);
                                    gradients<kRows>(e, columns[j]);
                                  }
#pragma GCC unroll 4
                                  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
                                    for (int j = 0; j < kJ; ++j) e[j] = columns[j][r];
                                    gradients<kColumns>(e, u);
#pragma GCC unroll 4
                                    for (int s = 0; s < kS; ++s)
                                      store(to + (kS * r + s) * a.out_matrix + c, u[s]);
                                  }
                                });
    }
  }
};

// u of weights[tap][column] of one channel, rounded once: out[rows][columns][column]
template <typename T>
struct TransformWeights {
  const T* weights;
  int64_t width;
  int rows, columns;  // wanted of u
  T* out;
  int64_t out_matrix;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const TransformWeights& a) {
    for_columns<double, kBytes, 1>(
        0, a.width, [&]<typename Vec, int>(int64_t j) MEMDENSE_INLINE_LAMBDA {
          using Stored = typename Simd<T, sizeof(Vec) / sizeof(double) * sizeof(T)>::Vec;
          Vec g[9], columns[3][5], u[5];
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) {
            g[tap] = __builtin_convertvector(load<Stored>(a.weights + tap * a.width + j), Vec);
          }
#pragma GCC unroll 3
          for (int s = 0; s < 3; ++s) winograd::weights(g[s], g[3 + s], g[6 + s], columns[s]);
#pragma GCC unroll 5
          for (int r = 0; r < 5; ++r) {
            if (r >= a.rows) continue;
            winograd::weights(columns[0][r], columns[1][r], columns[2][r], u);
#pragma GCC unroll 5
            for (int s = 0; s < 5; ++s) {
              if (s >= a.columns) continue;
              store(a.out + (a.columns * r + s) * a.out_matrix + j,
                    __builtin_convertvector(u[s], Stored));
            }
          }
        });
  }
};

// Outputs of `count` tiles from products[row][column of tiles][tile][column]:
// out[line][pixel][column], with as many lines and columns of pixels as are wanted of each tile.
template <typename T>
struct TransformOutputs {
  const T* products;
  int64_t matrix, width, count;
  int lines, pixels;  // wanted
  T* out;
  int64_t out_line;

  template <int kBytes, bool kRows, bool kColumns>
  static MEMDENSE_INLINE void tiles(const TransformOutputs& a) {
    constexpr int kI = kRows ? 2 : 1, kJ = kColumns ? 2 : 1;
    constexpr int kR = PairedAxis::products(kRows), kS = PairedAxis::products(kColumns);
    for (int64_t tile = 0; tile < a.count; ++tile) {
      for_columns<T, kBytes, 1>(
          0, a.width, [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
            const T* from = a.products + tile * a.width + c;
            Vec m[4], columns[4][2], out[2];
#pragma GCC unroll 4
            for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 4
              for (int r = 0; r < kR; ++r) m[r] = load<Vec>(from + (kS * r + s) * a.matrix);
              outputs<kRows>(m, columns[s]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < kI; ++i) {
              if (i >= a.lines) continue;
#pragma GCC unroll 4
              for (int s = 0; s < kS; ++s) m[s] = columns[s][i];
              outputs<kColumns>(m, out);
#pragma GCC unroll 2
              for (int j = 0; j < kJ; ++j) {
                if (j >= a.pixels) continue;
                store(a.out + i * a.out_line + (tile * a.pixels + j) * a.width + c, out[j]);
              }
            }
          });
    }
  }
};

// g of sums[row][column of m][column], of all tasks in their order: out[column][tap] of `count`
template <typename T>
struct TransformSums {
  const T* sums;
  int64_t tasks, task, matrix;  // values from one task's to the next, from one matrix to the next
  int rows, columns;            // there are of m
  int64_t width, count;
  T* out;

  template <int kBytes>
  static MEMDENSE_INLINE void run(const TransformSums& a) {
    T taps[9 * kMaxWidth];
    for_columns<T, kBytes, 1>(0, a.width, [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
      Vec m[5], columns[5][3], g[3];
#pragma GCC unroll 5
      for (int s = 0; s < 5; ++s) {
#pragma GCC unroll 5
        for (int r = 0; r < 5; ++r) {
          m[r] = Vec{};
          if (r >= a.rows || s >= a.columns) continue;
          const T* from = a.sums + (a.columns * r + s) * a.matrix + c;
          m[r] = load<Vec>(from);
          for (int64_t t = 1; t < a.tasks; ++t) m[r] += load<Vec>(from + t * a.task);
        }
        winograd::sums(m, columns[s]);
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 5
        for (int s = 0; s < 5; ++s) m[s] = columns[s][r];
        winograd::sums(m, g);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) store(taps + (3 * r + s) * a.width + c, g[s]);
      }
    });
    constexpr int kBytesOf8 = std::min<int>(kBytes, 8 * sizeof(T));
    transpose<T, kBytesOf8>(taps, a.width, a.count, 9, a.out, 9);
  }
};

// ---- outputs, or inputs' gradients

// The same walk as conv3x3::Walk, over tiles in place of bands.
template <typename T>
struct Walk {
  PairedAxis rows, columns;
  Lines<T> lines;
  Blocks<T> blocks;
  Panels<T> weights;
  int64_t images, tiles;  // tiles: of a chunk
  Matrices z;
  bool turned;  // the weights

  Walk(PairedAxis r, PairedAxis c, int64_t channels, int64_t outputs, int64_t images, bool turned)
      : rows(r),
        columns(c),
        lines{r.source, c.source, channels, pixel_stride<T>(channels)},
        blocks(outputs),
        weights{blocks, channels, rows.weights() * columns.weights()},
        images(images),
        tiles(chunk_tiles<T>(kChunkBytes, lines.stride + blocks.max_width(), blocks.max_rows(0),
                             weights.bytes(), kMinPieces * blocks.max_rows(0))),
        z(inputs_of(rows, columns, tiles * lines.stride + kSkew)),
        turned(turned) {}

  static Matrices inputs_of(const PairedAxis& rows, const PairedAxis& columns, int64_t size) {
    return Matrices(
        size, [&](Kind kind) { return rows.inputs(kind.rows) * columns.inputs(kind.columns); });
  }

  int64_t units() const { return images * rows.count() * columns.count(); }
  int64_t product_matrix() const { return tiles * blocks.max_width() + kSkew; }
  int64_t scratch_values() const {
    return lines.scratch_values() + z.values() + 16 * product_matrix() +
           4 * tiles * blocks.max_width();
  }

  // ---- weights: [block of columns][u][channel][column]

  int64_t packed_values() const { return weights.values(); }

  // of channels [begin, end)
  template <typename S>
  void pack(const Weights<S>& given, int64_t begin, int64_t end, T* packed) const {
    const Weights<S> source = turned ? given.turned() : given;
    T taps[kPackChannels * 9 * kMaxWidth];
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t width = blocks.width(block);
      for (int64_t r = begin, last; r < end; r = last) {
        last = std::min(end, r + kPackChannels);
        blocks.gather(source, r, last, block, taps, 9 * width, width);
        for (int64_t i = r; i < last; ++i) {
          memdense::dispatch<TransformWeights<T>>(TransformWeights<T>{
              taps + (i - r) * 9 * width, width, rows.weights(), columns.weights(),
              packed + weights.start(block) + i * width, weights.size(block)});
        }
      }
    }
  }

  // Tiles [begin, end) of all images', to emit as conv3x3::Walk does.
  template <typename S, typename Emit>
  void run(int64_t begin, int64_t end, const Images<const S>& source, const Reading<T>& read,
           const T* packed, T* scratch, Emit& emit) const {
    auto held = lines.hold(scratch);
    T* inputs = scratch + lines.scratch_values();
    T* products = inputs + z.values();
    T* results = products + 16 * product_matrix();
    for_tiles(
        rows, columns, begin, end, tiles,
        [&](const Run& run) {
          transform(rows, columns, lines, z, run, held, source, read, inputs);
        },
        [&](Kind kind, const std::vector<Run>& runs, int64_t count) {
          for (int64_t block = 0; block < blocks.count; ++block) {
            multiply(kind, count, block, packed, inputs, products);
            T* next = results;
            for (const Run& run : runs) next = finish(run, block, products, next, emit);
            emit.stored(block, results, (next - results) / blocks.width(block));
          }
        });
  }

  // z of a run of tiles
  template <typename S>
  static void transform(const PairedAxis& rows, const PairedAxis& columns, const Lines<T>& lines,
                        const Matrices& z, const Run& run, typename Lines<T>::Held& held,
                        const Images<const S>& source, const Reading<T>& read, T* inputs) {
    const TransformInputs<T> work{lines.pixels(held, source, read, run, run.kind.rows ? 4 : 3, rows,
                                               rows.padding, columns, columns.padding),
                                  rows.inputs(run.kind.rows),
                                  columns.inputs(run.kind.columns),
                                  &columns.pairs[run.first],
                                  run.count,
                                  lines.padded(),
                                  inputs + z.at(run.kind, 0) + run.slot * lines.stride,
                                  lines.stride,
                                  z.size};
    memdense::dispatch<OfKind<TransformInputs<T>>>(work, run.kind);
  }

 private:
  void multiply(Kind kind, int64_t count, int64_t block, const T* packed, const T* inputs,
                T* products) const {
    const int64_t width = blocks.width(block), channels = lines.channels;
    const T* u = packed + weights.start(block);
    const int64_t pieces = (count + blocks.max_rows(block) - 1) / blocks.max_rows(block);
    for (int a = 0; a < PairedAxis::products(kind.rows); ++a) {
      for (int b = 0; b < PairedAxis::products(kind.columns); ++b, products += product_matrix()) {
        Segment<T> terms[9];
        int64_t used = 0;
        for (int i = 0; i < rows.terms(kind.rows); ++i) {
          const Term row = PairedAxis::term(kind.rows, a, i);
          for (int j = 0; j < columns.terms(kind.columns); ++j) {
            const Term column = PairedAxis::term(kind.columns, b, j);
            const int matrix = row.z * columns.inputs(kind.columns) + column.z;
            terms[used++] = {inputs + z.at(kind, matrix),
                             u + (row.u * columns.weights() + column.u) * weights.size(block)};
          }
        }
        for (int64_t i = 0; i < pieces; ++i) {
          const int64_t from = i * count / pieces, to = (i + 1) * count / pieces;
          Segment<T> shifted[9];
          for (int64_t t = 0; t < used; ++t) {
            shifted[t] = {terms[t].a + from * lines.stride, terms[t].b};
          }
          blocks.kernels.run(static_cast<int>(to - from), blocks.vectors_of(block),
                             {shifted, used, channels, lines.stride, 1, width,
                              products + from * width, width, false});
        }
      }
    }
  }

  // Results of a run to [line][pixel][column]; where they end.
  template <typename Emit>
  T* finish(const Run& run, int64_t block, const T* products, T* results, Emit& emit) const {
    const int64_t width = blocks.width(block), pixels = run.count * run.outputs;
    const int64_t* places = columns.places_of(run.first);
    memdense::dispatch<OfKind<TransformOutputs<T>>>(
        TransformOutputs<T>{products + run.slot * width, product_matrix(), width, run.count,
                            run.row.outputs, run.outputs, results, pixels * width},
        run.kind);
    for (int i = 0; i < run.row.outputs; ++i, results += pixels * width) {
      emit.results(run.image, run.row.first + i * rows.dilation, block,
                   Result<T>{results, width, pixels, blocks.columns_of(block), places});
    }
    return results;
  }
};

// ---- the weight gradient

// The transformed gradient of weight[j, c], summed over tiles: partial[block of c][m][j][c].
template <typename T>
struct WeightWalk {
  PairedAxis rows, columns;
  Lines<T> x_lines, dy_lines;
  Blocks<T> blocks;  // of c
  Panels<T> sums;
  int64_t images, tiles;
  Matrices z, u;

  WeightWalk(const Geometry& g, bool padded)
      : rows(PairedAxis::forward(g, 0, padded)),
        columns(PairedAxis::forward(g, 1, padded)),
        x_lines{g.in[0], g.in[1], g.c, pixel_stride<T>(g.c)},
        dy_lines{g.out[0], g.out[1], g.k, pixel_stride<T>(g.k)},
        blocks(g.c),
        sums{blocks, g.k, rows.weights() * columns.weights()},
        images(g.n),
        // each chunk reads and writes all sums: the fewer the better
        tiles(std::max(
            kMinDepth,
            chunk_tiles<T>(kChunkBytes + std::max<int64_t>(0, kSharedBytes - sums.bytes()),
                           x_lines.stride + dy_lines.stride, 1, sums.bytes(), 2 * kMinDepth))),
        z(Walk<T>::inputs_of(rows, columns, tiles * x_lines.stride + kSkew)),
        u(tiles * dy_lines.stride + kSkew, [&](Kind kind) {
          const bool there = rows.inputs(kind.rows) * columns.inputs(kind.columns) > 0;
          return there ? PairedAxis::products(kind.rows) * PairedAxis::products(kind.columns) : 0;
        }) {}

  int64_t units() const { return images * rows.count() * columns.count(); }
  int64_t pixels_of_unit() const { return 4; }
  int64_t partial_values() const { return sums.values(); }
  int64_t scratch_values() const {
    return x_lines.scratch_values() + dy_lines.scratch_values() + z.values() + u.values();
  }

  // Tiles [begin, end) of all images'
  template <typename S>
  void run(int64_t begin, int64_t end, const Images<const S>& dy, const Images<const S>& x,
           const Reading<T>& read, T* scratch, T* partial) const {
    auto x_held = x_lines.hold(scratch);
    auto dy_held = dy_lines.hold(scratch + x_lines.scratch_values());
    T* inputs = scratch + x_lines.scratch_values() + dy_lines.scratch_values();
    T* gradients = inputs + z.values();
    for_tiles(
        rows, columns, begin, end, tiles,
        [&](const Run& run) {
          Walk<T>::transform(rows, columns, x_lines, z, run, x_held, x, read, inputs);
          transform(run, dy_held, dy, gradients);
        },
        [&](Kind kind, const std::vector<Run>&, int64_t count) {
          multiply(kind, count, inputs, gradients, partial);
        });
  }

  // Are the sums so many that tasks had better share the channels than the tiles?
  bool wide() const { return sums.bytes() > kSharedBytes; }

  // dweight[j, c, ky, kx] for j in [begin, end): the tasks' partial sums, added in their order
  void reduce(const T* partials, int64_t partial, int64_t tasks, int64_t begin, int64_t end,
              T* dweight, int64_t dweight_row) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t width = blocks.width(block);
      for (int64_t j = begin; j < end; ++j) {
        memdense::dispatch<TransformSums<T>>(TransformSums<T>{
            partials + sums.start(block) + j * width, tasks, partial, sums.size(block),
            rows.weights(), columns.weights(), width, blocks.columns_of(block),
            dweight + j * dweight_row + blocks.start(block) * 9});
      }
    }
  }

 private:
  template <typename S>
  void transform(const Run& run, typename Lines<T>::Held& held, const Images<const S>& dy,
                 T* gradients) const {
    const TransformGradients<T> work{
        dy_lines.pixels(held, dy, {}, run, run.kind.rows ? 2 : 1, rows, 0, columns, 0),
        &columns.pairs[run.first],
        run.count,
        dy_lines.padded(),
        gradients + u.at(run.kind, 0) + run.slot * dy_lines.stride,
        dy_lines.stride,
        u.size};
    memdense::dispatch<OfKind<TransformGradients<T>>>(work, run.kind);
  }

  void multiply(Kind kind, int64_t count, const T* inputs, const T* gradients, T* partial) const {
    for (int64_t block = 0; block < blocks.count; ++block) {
      T* m = partial + sums.start(block);
      const T* z_block = inputs + blocks.start(block);
      for (int a = 0; a < PairedAxis::products(kind.rows); ++a) {
        for (int b = 0; b < PairedAxis::products(kind.columns); ++b) {
          const T* e = gradients + u.at(kind, a * PairedAxis::products(kind.columns) + b);
          for (int i = 0; i < rows.terms(kind.rows); ++i) {
            const Term row = PairedAxis::term(kind.rows, a, i);
            for (int j = 0; j < columns.terms(kind.columns); ++j) {
              const Term column = PairedAxis::term(kind.columns, b, j);
              const int matrix = row.z * columns.inputs(kind.columns) + column.z;
              accumulate(block, count, e, z_block + z.at(kind, matrix),
                         m + (row.u * columns.weights() + column.u) * sums.size(block));
            }
          }
        }
      }
    }
  }

  // sums[j][c] += sum over tiles of e[tile][j] * z[tile][c], for a block of c
  void accumulate(int64_t block, int64_t count, const T* e, const T* z, T* sums) const {
    const int64_t outputs = dy_lines.channels, width = blocks.width(block);
    const int64_t pieces = (outputs + blocks.max_rows(block) - 1) / blocks.max_rows(block);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t j = i * outputs / pieces, j_end = (i + 1) * outputs / pieces;
      const Segment<T> segment{e + j, z};
      blocks.kernels.run(
          static_cast<int>(j_end - j), blocks.vectors_of(block),
          {&segment, 1, count, 1, dy_lines.stride, x_lines.stride, sums + j * width, width, true});
    }
  }
};

}  // namespace winograd
}  // namespace conv3x3
}  // namespace memdense
