// The kernels of conv3x3.h's problems, and their launchers. Included by one .cu a type of value.
//
// Blocks stay: each team of their warps walks every walkers()-th tile and loads the next chunk of
// channels while it multiplies the present one. Sums and statistics stay in registers until a team
// is through and leave it as one partial result a column; nothing is added atomically.
#pragma once

#include "conv3x3.h"

namespace memdense::conv3x3 {

using namespace device;

// ---- types of values

struct HalfKind {
  using Value = Half;
  static constexpr bool kTensorCores = true;
};
struct BFloat16Kind {
  using Value = BFloat16;
  static constexpr bool kTensorCores = true;
};
struct Tf32Kind {
  using Value = float;
  static constexpr bool kTensorCores = true;
};
struct FloatKind {
  using Value = float;
  static constexpr bool kTensorCores = false;
};

template <typename K>
using Value = typename K::Value;
template <typename K>
constexpr int kPerPiece = 16 / sizeof(Value<K>);
template <typename K>
constexpr int kChunk = kRowBytes / sizeof(Value<K>);  // channels staged at a time
constexpr int kStepBytes = 32;                        // of a row, multiplied by one instruction

// Rounded to TF32 where that is the type to multiply in.
template <typename K>
MEMDENSE_DEVICE void round_fragment(uint32_t (&words)[4]) {
  if constexpr (K::kTensorCores && sizeof(Value<K>) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = round_tf32(words[i]);
  }
}

// ---- teams

// Threads of a block that walk over tiles of their own and wait for each other alone. Of two teams
// one begins when the other multiplies, so that one prepares what it multiplies next, or finishes,
// while the other keeps the tensor cores busy.
struct Team {
  int number, count;
  int thread, threads;

  MEMDENSE_DEVICE int walker() const { return number * blocks() + block(); }
  MEMDENSE_DEVICE int walkers() const { return count * blocks(); }

  MEMDENSE_DEVICE void synchronize() const {
    if (number == 0) {
      synchronize_threads<kFirst>(threads);
    } else {
      synchronize_threads<kSecond>(threads);
    }
  }
  // The first one says once that the second may begin.
  MEMDENSE_DEVICE void wait_for_turn() const {
    if (number == 1) synchronize_threads<kTurn>(2 * threads);
  }
  MEMDENSE_DEVICE void give_turn() const {
    if (number + 1 < count) arrive_threads<kTurn>(2 * threads);
  }

 private:
  static constexpr int kFirst = 1, kSecond = 2, kTurn = 3;  // barriers; 0 is the block's
};

MEMDENSE_DEVICE Team all_threads() { return {0, 1, thread(), threads()}; }

MEMDENSE_DEVICE Team team_of(int count) {
  const int each = threads() >> (count - 1), number = thread() < each ? 0 : 1;
  return {number, count, thread() - number * each, each};
}

// ---- rows of 16-byte pieces in shared memory

// Offset of a piece; pieces of a row are permuted so that eight rows' same piece meet no bank
// twice.
template <int kPieces>
MEMDENSE_DEVICE int piece_at(int row, int piece) {
  constexpr int kRowsPerLine = kPieces < 8 ? 8 / kPieces : 1;
  constexpr int kMask = (kPieces < 8 ? kPieces : 8) - 1;
  return (row * kPieces + (piece ^ (row / kRowsPerLine & kMask))) * 16;
}

// The same for the halo. There a tile's outputs follow each other but for two pixels at the end of
// every line; `turn` makes up for these, so that its outputs are eight such rows wherever they
// start.
MEMDENSE_DEVICE int halo_piece_at(int row, int piece, int turn) {
  return (row * kRowPieces + (piece ^ ((row / 2 - turn) & (kRowPieces - 1)))) * 16;
}

// A number of a pixel, or -1, with its turn.
constexpr int kTurns = 4;
template <typename T>
MEMDENSE_DEVICE T with_turn(T number, int turn) {
  return number * kTurns + (turn & (kTurns - 1));
}
template <typename T>
MEMDENSE_DEVICE T number_of(T packed) {
  return packed >> 2;
}
template <typename T>
MEMDENSE_DEVICE int turn_of(T packed) {
  return static_cast<int>(packed) & (kTurns - 1);
}

template <typename V, int kPieces>
MEMDENSE_DEVICE V* value_at(char* rows, int row, int column) {
  constexpr int kPer = 16 / sizeof(V);
  return reinterpret_cast<V*>(rows + piece_at<kPieces>(row, column / kPer)) + column % kPer;
}

template <typename V>
MEMDENSE_DEVICE const V* halo_value_at(const char* rows, int row, int column, int turn) {
  constexpr int kPer = 16 / sizeof(V);
  return reinterpret_cast<const V*>(rows + halo_piece_at(row, column / kPer, turn)) + column % kPer;
}

template <typename V>
MEMDENSE_DEVICE void unpack_piece(const Piece& piece, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack(V{}, piece.words[i], to + i * 4 / sizeof(V));
}

template <typename V>
MEMDENSE_DEVICE void load_piece(const void* from, float (&to)[16 / sizeof(V)]) {
  const Piece piece = *static_cast<const Piece*>(from);
  unpack_piece<V>(piece, to);
}

template <typename V>
MEMDENSE_DEVICE void store_piece(void* to, const V* values) {
  constexpr int kCount = 16 / sizeof(V);
  union {
    Piece piece;
    V copy[kCount];
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) copy[i] = values[i];
  *static_cast<Piece*>(to) = piece;
}

// By one 8-byte access.
MEMDENSE_DEVICE void store_pair(float* to, float first, float second) {
  struct alignas(8) Pair {
    float first, second;
  };
  *reinterpret_cast<Pair*>(to) = {first, second};
}

// Eight values a thread handles at the end, of which `count` exist.
constexpr int kEight = 8;

template <typename V>
union Eight {
  Piece pieces[kEight * sizeof(V) / 16];
  V values[kEight];
};

template <typename V>
MEMDENSE_DEVICE Eight<V> load_eight(const V* from, bool vectors, int count) {
  constexpr int kPer = 16 / sizeof(V);
  Eight<V> to;
  if (vectors && count == kEight) {
#pragma unroll
    for (int i = 0; i < kEight / kPer; ++i) {
      to.pieces[i] = *reinterpret_cast<const Piece*>(from + i * kPer);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kEight; ++e) to.values[e] = e < count ? from[e] : V{};
  }
  return to;
}

template <typename V>
MEMDENSE_DEVICE void store_eight(V* to, int64_t stride, bool vectors, int count,
                                 const Eight<V>& from) {
  if (vectors && count == kEight) {
    constexpr int kPer = 16 / sizeof(V);
#pragma unroll
    for (int i = 0; i < kEight / kPer; ++i) {
      *reinterpret_cast<Piece*>(to + i * kPer) = from.pieces[i];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kEight; ++e, to += stride) {
      if (e < count) *to = from.values[e];
    }
  }
}

template <typename V>
MEMDENSE_DEVICE void unpack_eight(const Eight<V>& from, float (&to)[kEight]) {
  constexpr int kPer = 16 / sizeof(V);
#pragma unroll
  for (int i = 0; i < kEight / kPer; ++i) unpack_piece<V>(from.pieces[i], to + i * kPer);
}

template <typename V>
MEMDENSE_DEVICE Eight<V> pack_eight(const float (&from)[kEight]) {
  constexpr int kPer = 4 / sizeof(V);
  Eight<V> to;
#pragma unroll
  for (int i = 0; i < kEight / kPer; ++i) {
    to.pieces[i / 4].words[i % 4] = pack(V{}, from + i * kPer);
  }
  return to;
}

// Where a row of floats keeps column 8 * eight + j: the first four of all eights, then the others,
// so that neighbouring lanes read neighbouring pieces.
template <int kColumns>
MEMDENSE_DEVICE int float_at(int eight, int j) {
  return j / 4 * (ConvolutionMemory::padded(kColumns) / 2) + eight * 4 + j % 4;
}

// Eight columns of such a row.
template <int kColumns>
MEMDENSE_DEVICE void load_floats(const float* row, int eight, float (&to)[kEight]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float four[4];
    load_piece<float>(row + float_at<kColumns>(eight, half * 4), four);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[half * 4 + e] = four[e];
  }
}

// ---- a BatchNorm as a pair (s, t)

struct ScaleShift {
  float scale, shift;
};

template <typename V>
MEMDENSE_DEVICE float parameter(const void* data, bool is_float, int c, float otherwise) {
  if (!data) return otherwise;
  return is_float ? static_cast<const float*>(data)[c] : to_float(static_cast<const V*>(data)[c]);
}

// s = gamma / sqrt(var + eps), t = beta - mean * s
template <typename V>
MEMDENSE_DEVICE ScaleShift scale_shift(const Norm& norm, int c) {
  const float scale = parameter<V>(norm.gamma, norm.gamma_float, c, 1.f) *
                      quotient(1.f, square_root(norm.var[c] + norm.eps));
  const float shift = parameter<V>(norm.beta, norm.beta_float, c, 0.f);
  return {scale, fused_multiply_add(-norm.mean[c], scale, shift)};
}

// scale[c], shift[c] for c < `count` from channel `first` on; nothing comes of what is beyond.
template <typename V>
MEMDENSE_DEVICE void fill_vectors(const Norm& norm, int first, int channels, int count,
                                  float* scale, float* shift) {
  for (int i = thread(); i < count; i += threads()) {
    const bool exists = first + i < channels;
    const ScaleShift pair = exists ? scale_shift<V>(norm, first + i) : ScaleShift{0.f, 0.f};
    scale[i] = pair.scale;
    shift[i] = pair.shift;
  }
}

// The same of a block's columns, with their means, as three rows of floats.
template <typename V, int kColumns>
MEMDENSE_DEVICE void fill_rows(const Norm& norm, int first, int columns, float* rows) {
  constexpr int kPadded = ConvolutionMemory::padded(kColumns);
  for (int i = thread(); i < kColumns; i += threads()) {
    const bool exists = first + i < columns;
    const ScaleShift pair = exists ? scale_shift<V>(norm, first + i) : ScaleShift{0.f, 0.f};
    float* to = rows + float_at<kColumns>(i / kEight, i % kEight);
    to[0] = pair.scale;
    to[kPadded] = pair.shift;
    to[2 * kPadded] = exists ? norm.mean[first + i] : 0.f;
  }
}

// ---- where a tile's pixels lie

struct Division {
  int quotient, remainder;
};

MEMDENSE_DEVICE Division divide(int n, const Divisor& by) {
  const int quotient = (high_product(n, by.factor) + n) >> by.shift;
  return {quotient, n - quotient * by.value};
}

// The pixel of `axis` at position v, or -1 where there is zero.
MEMDENSE_DEVICE int pixel_at(const Axis& axis, int v) {
  if (axis.spread > 1) {
    if (v < 0 || v % axis.spread) return -1;
    v /= axis.spread;
  }
  return v >= 0 && v < axis.in ? v : -1;
}

// The slot of tables for the next tile.
MEMDENSE_DEVICE int after(int slot) { return slot + 1 < kTables ? slot + 1 : 0; }

// sources[i]: offset of the i-th pixel of the halo, -1 for a zero, with its turn. targets[i]:
// number of the tile's i-th output, -1 if there is none. places[i]: its first tap in the halo, with
// turn.
MEMDENSE_DEVICE void fill_tables(const Team& team, const Walk& walk, int tile,
                                 const Strides& source, const Strides& target, int64_t* sources,
                                 int64_t* targets, int* places) {
  const Axis &y = walk.y, &x = walk.x;
  const Division place = divide(tile, walk.by_across);
  const Division across = divide(place.remainder, walk.by_widths);
  const int phase_x = across.quotient, step_x = across.remainder * walk.width;
  // among the lines of all phases and images
  const Division line = divide(place.quotient * walk.height, walk.by_steps);
  const int image = line.quotient, step_y = line.remainder;
  // lines of outputs and of halo that fall into the first image
  const int first = y.steps - step_y;
  const int first_halo = (first < walk.height ? first : walk.height) * y.stride + 3 - y.stride;

  for (int i = team.thread; i < walk.halo; i += team.threads) {
    const Division at = divide(i, walk.by_halo_width);
    const int row = at.quotient, column = at.remainder;
    const bool later = row >= first_halo;
    const Division rest = divide(later ? row - first_halo : 0, walk.by_halo_lines);
    const int segment = later ? 1 + rest.quotient : 0;
    const int u = later ? rest.remainder : step_y * y.stride + row;
    const Division n = divide(image + segment, walk.by_phases);
    const int h = pixel_at(y, y.offset + y.stride * n.remainder + y.dilation * u);
    const int w =
        pixel_at(x, x.offset + x.stride * phase_x + x.dilation * (x.stride * step_x + column));
    const bool exists = n.quotient < walk.images && h >= 0 && w >= 0;
    sources[i] =
        with_turn<int64_t>(exists ? n.quotient * source.n + h * source.h + w * source.w : -1,
                           row + segment * walk.width);
  }
  for (int i = team.thread; i < walk.pixels; i += team.threads) {
    const Division at = divide(i, walk.by_width);
    const int row = at.quotient, column = at.remainder;
    const bool later = row >= first;
    const Division rest = divide(later ? row - first : 0, walk.by_steps);
    const int segment = later ? 1 + rest.quotient : 0;
    const int q = later ? rest.remainder : step_y + row;
    const Division n = divide(image + segment, walk.by_phases);
    const int h = n.remainder + y.dilation * q, w = phase_x + x.dilation * (step_x + column);
    const bool exists = row < walk.height && n.quotient < walk.images &&
                        step_x + column < x.steps && h < y.out && w < x.out;
    targets[i] = exists ? n.quotient * target.n + h * target.h + w * target.w : -1;
    // outside of the image too, so that those rows meet no other's bank
    const int halo_line = row * y.stride + segment * (3 - y.stride);
    places[i] = row < walk.height ? with_turn(halo_line * walk.halo_width + column * x.stride,
                                              halo_line + segment * walk.width)
                                  : 0;
  }
}

// ---- staging

// Channels `first`.. of the halo's pixels as rows of 64 bytes. Without 16-byte accesses a thread
// gathers its pieces value by value, so any strides are right.
template <typename K>
MEMDENSE_DEVICE void stage_halo(const Team& team, const void* source, int64_t channel_stride,
                                bool vectors, int channels, int first, const int64_t* sources,
                                int halo, char* rows) {
  using V = Value<K>;
  const V* data = static_cast<const V*>(source);
  if (vectors) {
    const int piece = team.thread % kRowPieces, c = first + piece * kPerPiece<K>;
#pragma unroll 2
    for (int row = team.thread / kRowPieces; row < halo; row += team.threads / kRowPieces) {
      const int64_t pixel = sources[row], offset = number_of(pixel);
      const bool exists = offset >= 0 && c < channels;
      copy_async(rows + halo_piece_at(row, piece, turn_of(pixel)),
                 exists ? data + offset + c : data, exists);
    }
    return;
  }
  // neighbouring threads take neighbouring values, of a pixel or of a channel
  const bool by_pixel = channel_stride != 1;
  for (int i = team.thread; i < halo * kRowPieces; i += team.threads) {
    const int row = by_pixel ? i % halo : i / kRowPieces;
    const int piece = by_pixel ? i / halo : i % kRowPieces;
    const int64_t pixel = sources[row], offset = number_of(pixel);
    const int c = first + piece * kPerPiece<K>;
    V values[kPerPiece<K>];
#pragma unroll
    for (int e = 0; e < kPerPiece<K>; ++e) {
      values[e] = offset >= 0 && c + e < channels ? data[offset + (c + e) * channel_stride] : V{};
    }
    store_piece<V>(rows + halo_piece_at(row, piece, turn_of(pixel)), values);
  }
}

// relu(s*x + t) in place, by the threads that staged the pieces; a zero of the padding stays zero.
// A NaN passes, as it does PyTorch's relu.
template <typename K>
MEMDENSE_DEVICE void normalise_halo(const Team& team, const float* scale, const float* shift,
                                    const int64_t* sources, int halo, char* rows) {
  using V = Value<K>;
  const int piece = team.thread % kRowPieces;  // the same in every round
  float s[kPerPiece<K>], t[kPerPiece<K>];
#pragma unroll
  for (int e = 0; e < kPerPiece<K>; ++e) {
    s[e] = scale[piece * kPerPiece<K> + e];
    t[e] = shift[piece * kPerPiece<K> + e];
  }
  for (int row = team.thread / kRowPieces; row < halo; row += team.threads / kRowPieces) {
    const int64_t pixel = sources[row];
    if (pixel < 0) continue;
    char* at = rows + halo_piece_at(row, piece, turn_of(pixel));
    float x[kPerPiece<K>];
    load_piece<V>(at, x);
#pragma unroll
    for (int e = 0; e < kPerPiece<K>; ++e) x[e] = fused_multiply_add(s[e], x[e], t[e]);
    Piece z;
#pragma unroll
    for (int i = 0; i < 4; ++i) z.words[i] = relu_word(V{}, x + i * kPerPiece<K> / 4);
    *reinterpret_cast<Piece*>(at) = z;
  }
}

// Of a power of two.
MEMDENSE_DEVICE constexpr int exponent(int n) { return n > 1 ? 1 + exponent(n / 2) : 0; }

// Rows [tap, column] of a chunk's channels; without 16-byte accesses, kLoads values at a time.
template <typename K, int kColumns, int kLoads>
MEMDENSE_DEVICE void stage_weight(const Convolution& a, int first_column, int chunk, char* rows) {
  using V = Value<K>;
  const V* data = static_cast<const V*>(a.weight);
  const int first = chunk * kChunk<K>;
  if (a.weight_vectors) {
    for (int i = thread(); i < kTaps * kColumns * kRowPieces; i += threads()) {
      const int row = i / kRowPieces, piece = i % kRowPieces;
      const int tap = row / kColumns, j = first_column + row % kColumns;
      const int c = first + piece * kPerPiece<K>;
      const bool exists = j < a.columns && c < a.channels;
      const int64_t offset =
          j * a.weight_column + c + tap / 3 * a.weight_tap[0] + tap % 3 * a.weight_tap[1];
      copy_async(rows + piece_at<kRowPieces>(row, piece), exists ? data + offset : data, exists);
    }
    return;
  }
  constexpr int kColumnBits = exponent(kColumns), kChannelBits = exponent(kChunk<K>);
  // shifts for divisions
  const int bits = a.columns_inner ? kColumnBits : kChannelBits, mask = (1 << bits) - 1;
#pragma unroll(kLoads)
  for (int i = thread(); i < kTaps * kColumns * kChunk<K>; i += threads()) {
    const int line = a.taps_inner ? i / kTaps : i >> bits;
    const int tap = a.taps_inner ? i % kTaps : line % kTaps;
    const int inner = (a.taps_inner ? line : i) & mask;
    const int outer = a.taps_inner ? line >> bits : line / kTaps;
    const int column = a.columns_inner ? inner : outer, channel = a.columns_inner ? outer : inner;
    const int j = first_column + column, c = first + channel;
    const int64_t offset = j * a.weight_column + c * a.weight_channel + tap / 3 * a.weight_tap[0] +
                           tap % 3 * a.weight_tap[1];
    *value_at<V, kRowPieces>(rows, tap * kColumns + column, channel) =
        j < a.columns && c < a.channels ? data[offset] : V{};
  }
}

// ---- multiplying

// The warp's 32 pixels by kColumns outputs: two fragments of 16 rows, each a column of 8-wide ones.
// Of a fragment, lane 4g + t holds rows g and g + 8 (values 0, 1 and 2, 3), columns 2t and 2t + 1.
template <int kColumns>
using Accumulators = float[2][kColumns / 8][4];

// Where a lane finds its pixels: for tensor cores the rows whose addresses it gives, for plain
// arithmetic rows g and g + 8 of both fragments.
struct LanePlaces {
  int at[4];
};

template <typename K>
MEMDENSE_DEVICE LanePlaces lane_places(int warp, const int* places) {
  const int lane = thread() % kWarp;
  const int* mine = places + warp * kWarpPixels;
  if constexpr (K::kTensorCores) {
    return {{mine[lane % 16], mine[16 + lane % 16], 0, 0}};
  } else {
    const int g = lane / 4;
    return {{mine[g], mine[g + 8], mine[g + 16], mine[g + 24]}};
  }
}

// kRoom: whether registers are left for a step's operands beside those of the last one.
template <typename K, int kColumns, bool kRoom>
MEMDENSE_DEVICE void multiply(const LanePlaces& places, int halo_width, int channels, char* halo,
                              char* weight, Accumulators<kColumns>& sum) {
  using V = Value<K>;
  const int lane = thread() % kWarp;
  const int steps = channels * static_cast<int>(sizeof(V)) > kStepBytes ? 2 : 1;
  if constexpr (K::kTensorCores) {
    const uint32_t halo_address = shared_address(halo);
    // lane 8i + r: row r of pair i / 2, its half i % 2
    const uint32_t weight_address =
        shared_address(weight) + piece_at<kRowPieces>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const auto multiply_taps = [&]<bool kTwoSteps>() {
      for (int tap_y = 0; tap_y < 3; ++tap_y) {
#pragma unroll
        for (int tap_x = 0; tap_x < 3; ++tap_x) {
          const int tap = tap_y * 3 + tap_x;
          uint32_t pixels[2];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const int row = number_of(places.at[m]) + tap_y * halo_width + tap_x;
            pixels[m] = halo_address + halo_piece_at(row, lane / 16, turn_of(places.at[m]) + tap_y);
          }
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            if (!kTwoSteps && step == steps) break;
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
              load_matrices(a[m], pixels[m] ^ (step * kStepBytes));
              round_fragment<K>(a[m]);
            }
#pragma unroll
            for (int pair = 0; pair < kColumns / 16; ++pair) {
              uint32_t b[4];
              load_matrices(b, (weight_address ^ (step * kStepBytes)) +
                                   (tap * kColumns + pair * 16) * kRowBytes);
              round_fragment<K>(b);
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                multiply_add(V{}, sum[m][2 * pair], a[m], b[0], b[1]);
                multiply_add(V{}, sum[m][2 * pair + 1], a[m], b[2], b[3]);
              }
            }
          }
        }
      }
    };
    // without branches in between, a step's operands are loaded while the last one is multiplied
    if (kRoom && steps == 2) {
      multiply_taps.template operator()<true>();
    } else {
      multiply_taps.template operator()<false>();
    }
  } else {
    const int t = lane % 4, pieces = 2 * steps;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int shift = tap / 3 * halo_width + tap % 3;
      // a sum of sums: short ones round less
      Accumulators<kColumns> part = {};
      for (int piece = 0; piece < pieces; ++piece) {
        float a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          load_piece<float>(halo + halo_piece_at(number_of(places.at[m]) + shift, piece,
                                                 turn_of(places.at[m]) + tap / 3),
                            a[m]);
        }
#pragma unroll
        for (int f = 0; f < kColumns / 8; ++f) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float b[4];
            const int row = tap * kColumns + f * 8 + 2 * t + e;
            load_piece<float>(weight + piece_at<kRowPieces>(row, piece), b);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              float& to = part[m / 2][f][m % 2 * 2 + e];
#pragma unroll
              for (int c = 0; c < 4; ++c) to = fused_multiply_add(a[m][c], b[c], to);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int f = 0; f < kColumns / 8; ++f) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][f][i] += part[m][f][i];
        }
      }
    }
  }
}

// ---- sums over a team's pixels

// What a thread knows of eight columns: mean and m2 of `count` values, or dbeta and dgamma.
struct Sums {
  float first[kEight], second[kEight];
  float count;
};

MEMDENSE_DEVICE void add(Sums& a, const Sums& b, bool moments) {
  float count = a.count;
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    if (moments) {
      count = a.count;
      merge(count, a.first[e], a.second[e], b.count, b.first[e], b.second[e]);
    } else {
      a.first[e] += b.first[e];
      a.second[e] += b.second[e];
    }
  }
  a.count = count;
}

// The team's partial results: lanes of a warp as a tree, then the warps in their order.
template <int kColumns>
MEMDENSE_DEVICE void leave_partials(const Team& team, const Convolution& a, Sums sums,
                                    float* shared, bool moments) {
  constexpr int kLanes = kColumns / kEight;  // of a row
  const int lane = thread() % kWarp, warp = team.thread / kWarp;
#pragma unroll
  for (int mask = kWarp / 2; mask >= kLanes; mask /= 2) {
    Sums other;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      other.first[e] = exchange(sums.first[e], mask);
      other.second[e] = exchange(sums.second[e], mask);
    }
    other.count = exchange(sums.count, mask);
    add(sums, other, moments);
  }
  const int warps = team.threads / kWarp;
  float *first = shared, *second = first + warps * kColumns, *counts = second + warps * kColumns;
  if (lane < kLanes) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      first[warp * kColumns + lane * kEight + e] = sums.first[e];
      second[warp * kColumns + lane * kEight + e] = sums.second[e];
    }
    if (lane == 0) counts[warp] = sums.count;
  }
  team.synchronize();
  const int column = team.thread, j = block_row() * kColumns + column;
  if (column >= kColumns || j >= a.columns) return;
  float count = counts[0], x = first[column], y = second[column];
  for (int w = 1; w < warps; ++w) {
    const float x2 = first[w * kColumns + column], y2 = second[w * kColumns + column];
    if (moments) {
      merge(count, x, y, counts[w], x2, y2);
    } else {
      x += x2;
      y += y2;
    }
  }
  const int64_t plane = static_cast<int64_t>(a.columns) * team.walkers();
  const int64_t at = static_cast<int64_t>(j) * team.walkers() + team.walker();
  a.partials[at] = x;
  a.partials[plane + at] = y;
  if (moments && j == 0) a.partials[2 * plane + team.walker()] = count;
}

// ---- the convolution

// Of a thread's eight columns.
struct Vectors {
  float scale[kEight], shift[kEight], mean[kEight];
};

// A row's eight columns from `column` on, as the mode finishes them; `y` and `norm` are
// kGradient's.
template <typename K, Mode kMode>
MEMDENSE_DEVICE void finish_row(const Convolution& a, int64_t pixel, int column, float (&x)[kEight],
                                const Eight<Value<K>>& y, const Vectors& norm, Sums& sums) {
  using V = Value<K>;
  const int count = a.columns - column < kEight ? a.columns - column : kEight;
  [[maybe_unused]] float y_of[kEight];
  if constexpr (kMode == Mode::kPlain) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (a.bias && e < count) x[e] += to_float(static_cast<const V*>(a.bias)[column + e]);
    }
  } else if constexpr (kMode == Mode::kForward) {
    if (a.keep) {
      const uint8_t* keep = a.keep + pixel * a.keep_row + column;
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        // a product, not a choice: what was infinite or NaN stays so, as with PyTorch's dropout
        if (e < count) x[e] *= keep[e] ? a.factor : 0.f;
      }
    }
  } else {
    unpack_eight<V>(y, y_of);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (fused_multiply_add(norm.scale[e], y_of[e], norm.shift[e]) <= 0.f) x[e] = 0.f;
    }
  }
  const Eight<V> stored = pack_eight<V>(x);
  store_eight<V>(static_cast<V*>(a.target) + pixel * a.target_row + column * a.target_column,
                 a.target_column, a.target_vectors, count, stored);
  // whoever takes the sums reads what was stored
  unpack_eight<V>(stored, x);
  if constexpr (kMode == Mode::kForward) {
    if (!a.statistics) return;
    sums.count += 1.f;
    const float share = quotient(1.f, sums.count);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float delta = x[e] - sums.first[e];
      sums.first[e] = fused_multiply_add(delta, share, sums.first[e]);
      sums.second[e] = fused_multiply_add(delta, x[e] - sums.first[e], sums.second[e]);
    }
  } else if constexpr (kMode == Mode::kGradient) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      sums.first[e] += x[e];
      sums.second[e] = fused_multiply_add(x[e], y_of[e] - norm.mean[e], sums.second[e]);
    }
  }
}

template <typename K, int kColumns, Mode kMode>
MEMDENSE_KERNEL(max_convolution_threads(kColumns, K::kTensorCores), 1)
convolve(const Convolution a) {
  using V = Value<K>;
  const ConvolutionMemory at(a.walk.halo, a.walk.pixels, kColumns, a.channels, sizeof(V),
                             a.resident, a.teams, kMode);
  // what registers allow beside a tile's and a block's sums; before there are any, 8 loads
  constexpr int kLoads = kMode == Mode::kGradient ? 1 : 4;
  constexpr bool kRoom =
      sizeof(V) == 2 && (kColumns < 32 || (kColumns == 32 && kMode != Mode::kGradient));
  constexpr int kWeightBytes = kTaps * kColumns * kRowBytes;
  constexpr int kPadded = ConvolutionMemory::padded(kColumns);
  constexpr bool kSums = kMode != Mode::kPlain;
  const Team team = team_of(a.teams);
  char* const weights = shared_memory();
  float* const vectors = reinterpret_cast<float*>(weights + at.vectors);
  char* const own = weights + at.teams + team.number * at.team;
  int64_t* const sources = reinterpret_cast<int64_t*>(own + at.sources);
  int64_t* const targets = reinterpret_cast<int64_t*>(own + at.targets);
  int* const places = reinterpret_cast<int*>(own + at.places);
  const int halo = a.walk.halo, pixels = a.walk.pixels;
  const int chunks = (a.channels + kChunk<K> - 1) / kChunk<K>;
  const int first_column = block_row() * kColumns;
  const int lane = thread() % kWarp, warp = team.thread / kWarp;

  // a weight that does not stay is that of the only team
  const auto stage = [&](int slot, int chunk, int buffer) {
    stage_halo<K>(team, a.source, a.source_strides.c, a.source_vectors, a.channels,
                  chunk * kChunk<K>, sources + slot * halo, halo, own + buffer * halo * kRowBytes);
    if (!a.resident) {
      stage_weight<K, kColumns, kLoads>(a, first_column, chunk, weights + buffer * kWeightBytes);
    }
  };
  const auto fill = [&](int slot, int tile) {
    if (tile >= a.walk.tiles) return;
    fill_tables(team, a.walk, tile, a.source_strides, a.place, sources + slot * halo,
                targets + slot * pixels, places + slot * pixels);
  };

  if constexpr (kMode == Mode::kForward) {
    fill_vectors<V>(a.norm, 0, a.channels, chunks * kChunk<K>, vectors,
                    vectors + chunks * kChunk<K>);
  } else if constexpr (kMode == Mode::kGradient) {
    fill_rows<V, kColumns>(a.norm, first_column, a.columns, vectors);
  }
  if (a.resident) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stage_weight<K, kColumns, 8>(a, first_column, chunk, weights + chunk * kWeightBytes);
    }
  }
  int slot = 0, buffer = 0;
  fill(slot, team.walker());
  fill(after(slot), team.walker() + team.walkers());
  team.synchronize();
  if (team.walker() < a.walk.tiles) stage(slot, 0, buffer);
  // what everybody staged
  wait_async();
  synchronize_block();
  team.wait_for_turn();

  // At the end a thread handles eight columns of kRows rows of each fragment, through shared
  // memory.
  constexpr int kLanes = kColumns / kEight, kRows = 16 * kLanes / kWarp;
  const auto column_of = [&](int lane) { return first_column + lane % kLanes * kEight; };
  const auto row_of = [](int lane, int i) { return lane / kLanes + i * (kWarp / kLanes); };
  const auto pixel_of = [&](int lane, int m, int i) {
    return targets[slot * pixels + warp * kWarpPixels + m * 16 + row_of(lane, i)];
  };
  // kGradient's y comes from far: a tile's begins to move before its products, and is loaded a
  // fragment ahead where registers allow
  constexpr bool kAhead = sizeof(V) == 2;
  const auto y_of = [&](int lane, int64_t pixel) {
    return static_cast<const V*>(a.y) + pixel * a.y_row + column_of(lane);
  };
  const auto fetch_y = [&](int lane, int m, int i) {
    const int64_t pixel = pixel_of(lane, m, i);
    if (pixel >= 0 && column_of(lane) < a.columns) prefetch(y_of(lane, pixel));
  };
  const auto load_y = [&](Eight<V>& y, int lane, int m, int i) {
    if constexpr (kMode != Mode::kGradient) return;
    const int64_t pixel = pixel_of(lane, m, i);
    const int count = a.columns - column_of(lane);
    if (pixel >= 0 && count > 0) {
      y = load_eight(y_of(lane, pixel), a.y_vectors, count < kEight ? count : kEight);
    }
  };

  Sums sums = {};
  for (int tile = team.walker(); tile < a.walk.tiles; tile += team.walkers()) {
    if (kMode == Mode::kGradient && lane % kLanes * kEight * sizeof(V) % kSectorBytes == 0) {
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) fetch_y(lane, m, i);
      }
    }
    const LanePlaces mine = lane_places<K>(warp, places + slot * pixels);
    Accumulators<kColumns> sum = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      char* const rows = own + buffer * halo * kRowBytes;
      wait_async();
      if constexpr (kMode == Mode::kForward) {
        const float* scale = vectors + chunk * kChunk<K>;
        normalise_halo<K>(team, scale, scale + chunks * kChunk<K>, sources + slot * halo, halo,
                          rows);
      }
      // all see this chunk, and none still reads the last one
      team.synchronize();
      if (tile == team.walker() && chunk == 0) team.give_turn();
      if (chunk + 1 < chunks) {
        stage(slot, chunk + 1, buffer ^ 1);
      } else {
        const int next = tile + team.walkers();
        if (next < a.walk.tiles) stage(after(slot), 0, buffer ^ 1);
        fill(after(after(slot)), next + team.walkers());
      }
      multiply<K, kColumns, kRoom>(mine, a.walk.halo_width, a.channels - chunk * kChunk<K>, rows,
                                   weights + (a.resident ? chunk : buffer) * kWeightBytes, sum);
      buffer ^= 1;
    }

    // anew for each tile: addresses in registers would be in the products' way
    const int lane = opaque(thread() % kWarp), eight = lane % kLanes, column = column_of(lane);
    float* const scratch = reinterpret_cast<float*>(own + at.scratch) + warp * 16 * kPadded;
    Eight<V> y[kAhead ? kRows : 1];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kRows && kAhead && m == 0; ++i) load_y(y[i], lane, 0, i);
      synchronize_warp();
#pragma unroll
      for (int f = 0; f < kColumns / 8; ++f) {
        float* to = scratch + lane / 4 * kPadded + float_at<kColumns>(f, lane % 4 * 2);
        store_pair(to, sum[m][f][0], sum[m][f][1]);
        store_pair(to + 8 * kPadded, sum[m][f][2], sum[m][f][3]);
      }
      synchronize_warp();
      Vectors norm;
      // once for many rows; there are no registers for the mean
      constexpr bool kOnce = kColumns == 64 && kAhead;
      const auto load_norm = [&] {
        load_floats<kColumns>(vectors, eight, norm.scale);
        load_floats<kColumns>(vectors + kPadded, eight, norm.shift);
      };
      if constexpr (kMode == Mode::kGradient && kOnce) load_norm();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!kAhead) load_y(y[0], lane, m, i);
        const int64_t pixel = pixel_of(lane, m, i);
        if (pixel >= 0 && column < a.columns) {
          if constexpr (kMode == Mode::kGradient) {
            if (!kOnce) load_norm();
            load_floats<kColumns>(vectors + 2 * kPadded, eight, norm.mean);
          }
          float x[kEight];
          load_floats<kColumns>(scratch + row_of(lane, i) * kPadded, eight, x);
          finish_row<K, kMode>(a, pixel, column, x, y[kAhead ? i : 0], norm, sums);
        }
        if (kAhead && m == 0) load_y(y[i], lane, 1, i);
      }
    }
    slot = after(slot);
  }
  if (kSums && a.partials) {
    // the halo's memory is free once all have multiplied
    team.synchronize();
    leave_partials<kColumns>(team, a, sums, reinterpret_cast<float*>(own), kMode == Mode::kForward);
  }
}

// ---- the weight's gradient

// A warp has a line of taps, a chunk of channels and up to 32 columns, whose sums its registers
// hold.
template <int kColumns>
constexpr int kWarpColumns = kColumns < 32 ? kColumns : 32;

// dy's columns `first`.. of the tile's pixels, as rows of kColumns values.
template <typename K, int kColumns>
MEMDENSE_DEVICE void stage_dy(const WeightGradient& a, int first, const int64_t* targets,
                              char* rows) {
  using V = Value<K>;
  constexpr int kPieces = kColumns / kPerPiece<K>;
  const V* data = static_cast<const V*>(a.dy);
  if (a.dy_vectors) {
    const int piece = thread() % kPieces, j = first + piece * kPerPiece<K>;
    for (int row = thread() / kPieces; row < a.walk.pixels; row += threads() / kPieces) {
      const int64_t offset = targets[row];
      const bool exists = offset >= 0 && j < a.columns;
      copy_async(rows + piece_at<kPieces>(row, piece), exists ? data + offset + j : data, exists);
    }
    return;
  }
  const bool by_pixel = a.dy_strides.c != 1;
  for (int i = thread(); i < a.walk.pixels * kPieces; i += threads()) {
    const int row = by_pixel ? i % a.walk.pixels : i / kPieces;
    const int piece = by_pixel ? i / a.walk.pixels : i % kPieces;
    const int64_t offset = targets[row];
    const int j = first + piece * kPerPiece<K>;
    V values[kPerPiece<K>];
#pragma unroll
    for (int e = 0; e < kPerPiece<K>; ++e) {
      values[e] = offset >= 0 && j + e < a.columns ? data[offset + (j + e) * a.dy_strides.c] : V{};
    }
    store_piece<V>(rows + piece_at<kPieces>(row, piece), values);
  }
}

// A warp's sums at a tap, and at its three: columns in 16s by channels in 8s.
template <typename K, int kColumns>
using TapSums = float[kWarpColumns<kColumns> / 16][kChunk<K> / 8][4];
template <typename K, int kColumns>
using WeightSums = TapSums<K, kColumns>[3];

// What a warp multiplies: a tile's places, its chunk's halo and dy, at its taps and from its first
// column on.
struct TileOperands {
  const int* places;
  char *halo, *dy;
  int halo_width, tap_y, first_column;
};

// Of 16 pixels: dy by columns in 16s, z at a tap by channels in 16s.
template <int kColumns>
using DyFragments = uint32_t[kWarpColumns<kColumns> / 16][4];
template <typename K>
using ZFragments = uint32_t[kChunk<K> / 16][4];

// Lane 8i + r gives row r of matrix i.
template <typename K, int kColumns>
MEMDENSE_DEVICE void load_dy(const TileOperands& from, int first, DyFragments<kColumns>& to) {
  constexpr int kPieces = kColumns / kPerPiece<K>;
  const int matrix = thread() % kWarp / 8, row = thread() % 8;
  // sixteen rows further on, pieces are permuted in the same way
  const uint32_t at =
      shared_address(from.dy) + first * kPieces * 16 +
      piece_at<kPieces>(matrix / 2 * 8 + row, from.first_column / kPerPiece<K> + matrix % 2);
#pragma unroll
  for (int m = 0; m < kWarpColumns<kColumns> / 16; ++m) {
    load_matrices_transposed(to[m], at ^ m * kStepBytes);
  }
}

template <typename K>
MEMDENSE_DEVICE void load_z(const TileOperands& from, int place, int tap, ZFragments<K>& to) {
  const int row = number_of(place) + from.tap_y * from.halo_width + tap;
  const int turn = turn_of(place) + from.tap_y, piece = thread() % kWarp / 16;
  const uint32_t at = shared_address(from.halo) + halo_piece_at(row, piece, turn);
#pragma unroll
  for (int c = 0; c < kChunk<K> / 16; ++c) load_matrices_transposed(to[c], at ^ c * kStepBytes);
}

template <typename K, int kColumns>
MEMDENSE_DEVICE void multiply_tap(const DyFragments<kColumns>& dy, const ZFragments<K>& z,
                                  TapSums<K, kColumns>& sum) {
#pragma unroll
  for (int c = 0; c < kChunk<K> / 16; ++c) {
#pragma unroll
    for (int m = 0; m < kWarpColumns<kColumns> / 16; ++m) {
      multiply_add(Value<K>{}, sum[m][2 * c], dy[m], z[c][0], z[c][1]);
      multiply_add(Value<K>{}, sum[m][2 * c + 1], dy[m], z[c][2], z[c][3]);
    }
  }
}

// The same of 16 pixels of four bytes, which ldmatrix does not transpose: lanes read their own.
template <typename K, int kColumns>
MEMDENSE_DEVICE void multiply_pixels(const TileOperands& from, int first,
                                     WeightSums<K, kColumns>& sum) {
  using V = Value<K>;
  constexpr int kPieces = kColumns / kPerPiece<K>, kOurs = kWarpColumns<kColumns>;
  const int lane = thread() % kWarp, g = lane / 4, t = lane % 4;
  if constexpr (K::kTensorCores) {
    union Word {
      float value;
      uint32_t bits;
    };
    const auto tf32 = [](const float* from) {
      Word word;
      word.value = *from;
      return round_tf32(word.bits);
    };
#pragma unroll
    for (int step = 0; step < 16; step += 8) {
      const int pixel = first + step + t;
      uint32_t a[kOurs / 16][4];
#pragma unroll
      for (int m = 0; m < kOurs / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = tf32(value_at<V, kPieces>(from.dy, pixel + i / 2 * 4,
                                              from.first_column + m * 16 + g + i % 2 * 8));
        }
      }
      const auto z = [&](int packed, int tap, int c) {
        const int row = number_of(packed) + from.tap_y * from.halo_width + tap;
        return tf32(halo_value_at<V>(from.halo, row, c, turn_of(packed) + from.tap_y));
      };
      const int packed = from.places[pixel], packed4 = from.places[pixel + 4];
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const uint32_t b0 = z(packed, tap, f * 8 + g), b1 = z(packed4, tap, f * 8 + g);
#pragma unroll
          for (int m = 0; m < kOurs / 16; ++m) multiply_add(V{}, sum[tap][m][f], a[m], b0, b1);
        }
      }
    }
  } else {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      // a sum of sums: short ones round less
      float part[kOurs / 16][2][4] = {};
      for (int pixel = first; pixel < first + 16; ++pixel) {
        const int packed = from.places[pixel];
        const int row = number_of(packed) + from.tap_y * from.halo_width + tap;
        float a[kOurs / 8];
#pragma unroll
        for (int m = 0; m < kOurs / 8; ++m) {
          a[m] = *value_at<V, kPieces>(from.dy, pixel, from.first_column + m * 8 + g);
        }
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          const float* b =
              halo_value_at<V>(from.halo, row, f * 8 + 2 * t, turn_of(packed) + from.tap_y);
#pragma unroll
          for (int m = 0; m < kOurs / 8; ++m) {
            float* to = part[m / 2][f] + m % 2 * 2;
            to[0] = fused_multiply_add(a[m], b[0], to[0]);
            to[1] = fused_multiply_add(a[m], b[1], to[1]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kOurs / 16; ++m) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[tap][m][f][i] += part[m][f][i];
        }
      }
    }
  }
}

// sum[tap][j, c] += dy[pixel, j] * z[pixel + tap, c] over a tile's pixels, `used` of them in 32s.
template <typename K, int kColumns>
MEMDENSE_DEVICE void multiply_tile(const TileOperands& from, int used,
                                   WeightSums<K, kColumns>& sum) {
  if constexpr (sizeof(Value<K>) == 2) {
    // a tap's operands are loaded while the last one's are multiplied
    const int* const mine = from.places + thread() % 16;
    DyFragments<kColumns> dy[2];
    ZFragments<K> z[2];
    int place = mine[0];
    load_dy<K, kColumns>(from, 0, dy[0]);
    load_z<K>(from, place, 0, z[0]);
    for (int first = 0; first < used; first += 32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int next = first + half * 16 + 16;
        const int next_place = next < used ? mine[next] : place;
        load_z<K>(from, place, 1, z[half ^ 1]);
        multiply_tap<K, kColumns>(dy[half], z[half], sum[0]);
        load_z<K>(from, place, 2, z[half]);
        multiply_tap<K, kColumns>(dy[half], z[half ^ 1], sum[1]);
        place = next_place;
        if (next < used) {
          load_dy<K, kColumns>(from, next, dy[half ^ 1]);
          load_z<K>(from, place, 0, z[half ^ 1]);
        }
        multiply_tap<K, kColumns>(dy[half], z[half], sum[2]);
      }
    }
  } else {
    for (int first = 0; first < used; first += 16) multiply_pixels<K, kColumns>(from, first, sum);
  }
}

// Tiles that a block sums up in registers before it adds them to what it leaves: a longer sum in
// float32 rounds more than PyTorch's, and tensor cores round each towards zero. 0 for all of them:
// operands of 16 bits round more than any of these sums.
template <typename K>
constexpr int kTogether = sizeof(Value<K>) == 2 ? 0
                          : K::kTensorCores     ? 64
                                                : 16;

// Block (split, channels and columns): its tiles' share of 16 to 64 rows of dW, by one or two
// chunks of channels.
template <typename K, int kColumns>
MEMDENSE_KERNEL(kWarp* weight_warps(kColumns, kMaxChunks), weight_blocks(kColumns, kMaxChunks))
weight_gradient(const WeightGradient a) {
  using V = Value<K>;
  const WeightGradientMemory at(a.walk.halo, a.walk.pixels, kColumns, sizeof(V), a.chunks);
  char* const memory = shared_memory();
  float* const scale = reinterpret_cast<float*>(memory + at.vectors);
  float* const shift = scale + a.chunks * kChunk<K>;
  int64_t* const sources = reinterpret_cast<int64_t*>(memory + at.sources);
  int64_t* const targets = reinterpret_cast<int64_t*>(memory + at.targets);
  int* const places = reinterpret_cast<int*>(memory + at.places);
  const int halo = a.walk.halo, pixels = a.walk.pixels;
  const int all_chunks = (a.channels + kChunk<K> - 1) / kChunk<K>;
  const int groups = (all_chunks + a.chunks - 1) / a.chunks;
  const int first_chunk = block_row() % groups * a.chunks;
  const int first_column = block_row() / groups * kColumns;
  const int left = all_chunks - first_chunk, chunks = left < a.chunks ? left : a.chunks;
  const int used = (a.walk.height * a.walk.width + 31) / 32 * 32;
  // the warp's
  const int tap_y = thread() / kWarp % 3, chunk = thread() / kWarp / 3 % a.chunks;
  const int our_column = thread() / kWarp / 3 / a.chunks * kWarpColumns<kColumns>;
  const Team team = all_threads();

  const auto halo_of = [&](int buffer, int chunk) {
    return memory + (buffer * a.chunks + chunk) * halo * kRowBytes;
  };
  const auto dy_of = [&](int buffer) {
    return memory + at.dy + buffer * pixels * kColumns * static_cast<int>(sizeof(V));
  };
  const auto fill = [&](int slot, int tile) {
    if (tile >= a.walk.tiles) return;
    fill_tables(team, a.walk, tile, a.source_strides, a.dy_strides, sources + slot * halo,
                targets + slot * pixels, places + slot * pixels);
  };
  const auto stage = [&](int slot, int buffer) {
    for (int i = 0; i < chunks; ++i) {
      stage_halo<K>(team, a.source, a.source_strides.c, a.source_vectors, a.channels,
                    (first_chunk + i) * kChunk<K>, sources + slot * halo, halo, halo_of(buffer, i));
    }
    stage_dy<K, kColumns>(a, first_column, targets + slot * pixels, dy_of(buffer));
  };

  if (a.norm.mean) {
    fill_vectors<V>(a.norm, first_chunk * kChunk<K>, a.channels, a.chunks * kChunk<K>, scale,
                    shift);
  }
  int slot = 0, buffer = 0;
  fill(slot, block());
  fill(after(slot), block() + blocks());
  synchronize_block();
  stage(slot, buffer);

  WeightSums<K, kColumns> sum = {};
  const auto leave = [&](bool first) {
    const int lane = opaque(thread()) % kWarp;
    const int64_t plane = static_cast<int64_t>(a.columns) * a.channels;
    float* const to = a.partials + block() * kTaps * plane;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
      for (int m = 0; m < kWarpColumns<kColumns> / 16; ++m) {
#pragma unroll
        for (int f = 0; f < kChunk<K> / 8; ++f) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = first_column + our_column + m * 16 + lane / 4 + i / 2 * 8;
            const int c = (first_chunk + chunk) * kChunk<K> + f * 8 + lane % 4 * 2 + i % 2;
            if (chunk < chunks && j < a.columns && c < a.channels) {
              float& value =
                  to[(tap_y * 3 + tap) * plane + static_cast<int64_t>(j) * a.channels + c];
              value = first ? sum[tap][m][f][i] : value + sum[tap][m][f][i];
            }
            sum[tap][m][f][i] = 0;
          }
        }
      }
    }
  };

  int tiles = 0;
  for (int tile = block(); tile < a.walk.tiles; tile += blocks(), ++tiles) {
    if constexpr (kTogether<K> > 0) {
      if (tiles > 0 && tiles % kTogether<K> == 0) leave(tiles == kTogether<K>);
    }
    wait_async();
    for (int i = 0; i < chunks && a.norm.mean; ++i) {
      normalise_halo<K>(team, scale + i * kChunk<K>, shift + i * kChunk<K>, sources + slot * halo,
                        halo, halo_of(buffer, i));
    }
    synchronize_block();
    if (tile + blocks() < a.walk.tiles) stage(after(slot), buffer ^ 1);
    fill(after(after(slot)), tile + 2 * blocks());
    if (chunk < chunks) {
      multiply_tile<K, kColumns>({places + slot * pixels, halo_of(buffer, chunk), dy_of(buffer),
                                  a.walk.halo_width, tap_y, our_column},
                                 used, sum);
    }
    slot = after(slot);
    buffer ^= 1;
  }
  leave(kTogether<K> == 0 || tiles <= kTogether<K>);
}

// ---- launchers

template <typename K>
void launch_convolution(const Convolution& a, Mode mode, int columns, Grid grid, Stream stream) {
  const auto of_columns = [&]<int kColumns>() {
    const auto kernel = mode == Mode::kPlain     ? convolve<K, kColumns, Mode::kPlain>
                        : mode == Mode::kForward ? convolve<K, kColumns, Mode::kForward>
                                                 : convolve<K, kColumns, Mode::kGradient>;
    device::launch(kernel, grid, stream, a);
  };
  if (columns == 16) return of_columns.template operator()<16>();
  if (columns == 32) return of_columns.template operator()<32>();
  if constexpr (K::kTensorCores) of_columns.template operator()<64>();
}

template <typename K>
void launch_weight_gradient(const WeightGradient& a, int columns, Grid grid, Stream stream) {
  const auto of_columns = [&]<int kColumns>() {
    grid.threads = kWarp * weight_warps(kColumns, a.chunks);
    device::launch(weight_gradient<K, kColumns>, grid, stream, a);
  };
  if (columns == 16) return of_columns.template operator()<16>();
  if (columns == 32) return of_columns.template operator()<32>();
  of_columns.template operator()<64>();
}

}  // namespace memdense::conv3x3
