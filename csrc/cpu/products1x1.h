// The products of a 1x1 convolution and its backward, of a tile of rows at a time: by gemm.h's
// panels in what sums are taken in, or on amx.h's tiles in bfloat16.
//
// Both are made for a weight's shape and then pack() it. They offer a Value, what both sides of a
// product are stored as; the rows of a tile and of its units; run(), which calls a kernel;
// forward(); and for the backward their Buffers, incoming(), da() and dweight(). Scratch is zero at
// first, and counted in what they sum in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "gemm.h"
#include "tensors.h"
#include "vector.h"
#include "workers.h"

namespace memdense {

// Rows of tiles of nearly equal size, each but the last a multiple of Products' unit.
template <typename Products>
int64_t tile_rows(int64_t rows) {
  return round_up(pieces(rows, pieces(rows, Products::kTileRows)), Products::kUnit);
}

// Of products with W^T, forward, or with W of a weight W [outputs, channels].
struct RightSide {
  int64_t outputs, channels, depth, columns;
  bool transposed;

  RightSide(int64_t outputs, int64_t channels, bool forward)
      : outputs(outputs),
        channels(channels),
        depth(forward ? channels : outputs),
        columns(forward ? outputs : channels),
        transposed(forward) {}
};

template <typename S>
class ByPanels : RightSide {
  using T = Compute<S>;

 public:
  using Value = T;
  static constexpr int64_t kUnit = kMicroRows, kTileRows = 96;

  using RightSide::RightSide;

  void pack(const Tensor& weight) {
    matrix<const S>(weight, outputs, channels, "weight");
    const Tensor exact = as_computed<T>(weight);
    const T* w = static_cast<const T*>(exact.data_ptr());
    const int64_t row = exact.stride(0);
    packed = make<T>({packed_values()});
    b = static_cast<T*>(packed.data_ptr());
    const Pack work{w, transposed ? 1 : row, transposed ? row : 1, depth, columns, b};
    Workers(panels()).run(
        [&](int64_t, int64_t first, int64_t last) { dispatch<Pack>(work, first, last); });
  }

  // Of packed weights, and of what is beside them while they are packed.
  int64_t packed_bytes() const { return packed_values() * sizeof(T); }
  int64_t packing_bytes() const { return kInPlace ? 0 : depth * columns * sizeof(T); }

  template <typename Kernel, typename... Args>
  static void run(const Args&... args) {
    dispatch<Kernel>(args...);
  }

  int64_t forward_scratch() const { return kTileRows * (kDepthRow + (kInPlace ? 0 : columns)); }

  // y [rows, outputs] = z @ W^T, of which read(first, count, z, z_row) makes some channels.
  template <int kBytes, typename Read>
  MEMDENSE_INLINE void forward(const Read& read, int64_t rows, S* y, T* z) const {
    constexpr int64_t panel = Simd<T, kBytes>::kPanel;
    T* products;
    if constexpr (kInPlace)
      products = y;
    else
      products = z + kTileRows * kDepthRow;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = std::min(kDepth, depth - k);
      read(k, count, z, kDepthRow);
      for (int64_t j = 0; j < columns; j += panel) {
        panel_product<T, kBytes>(z, kDepthRow, 1, b + j * depth + k * panel, count, products + j,
                                 columns, rows, std::min(panel, columns - j), k > 0);
      }
    }
    if constexpr (kInPlace) return;
    for_columns<T, kBytes, 1>(0, rows * columns,
                              [&]<typename Vec, int>(int64_t i) MEMDENSE_INLINE_LAMBDA {
                                store(y + i, load<Vec>(products + i));
                              });
  }

  int64_t dy_row() const { return round_up(depth, 16) + 16; }
  int64_t backward_scratch() const { return kTileRows * (dy_row() + 2 * kWidestPanel); }

  // dy [rows, outputs]; da and z are of some channels, `panel` at most.
  template <int kBytes>
  struct Buffers {
    static constexpr int64_t panel = Simd<T, kBytes>::kPanel;
    T *dy, *da, *z;

    MEMDENSE_INLINE Buffers(const ByPanels& of, T* scratch)
        : dy(scratch), da(dy + kTileRows * of.dy_row()), z(da + kTileRows * panel) {}
  };

  // dy of as many rows is there.
  template <int kBytes>
  MEMDENSE_INLINE void incoming(const Buffers<kBytes>&, int64_t, bool) const {}

  // da = dy @ W for channels j..j + count.
  template <int kBytes>
  MEMDENSE_INLINE void da(const Buffers<kBytes>& at, int64_t rows, int64_t j, int64_t count) const {
    for (int64_t k = 0; k < depth; k += kDepth) {
      panel_product<T, kBytes>(at.dy + k, dy_row(), 1, b + j * depth + k * at.panel,
                               std::min(kDepth, depth - k), at.da, at.panel, rows, count, k > 0);
    }
  }

  // dW (+)= dy^T @ z there, for dW [outputs, channels].
  template <int kBytes>
  MEMDENSE_INLINE void dweight(const Buffers<kBytes>& at, int64_t rows, int64_t j, int64_t count,
                               T* dw, bool add) const {
    panel_product<T, kBytes>(at.dy, 1, dy_row(), at.z, rows, dw + j, columns, depth, count, add);
  }

 private:
  // A little more than the values of a row: rows a power of two apart would share cache sets.
  static constexpr int64_t kDepthRow = kDepth + 16;
  static constexpr int64_t kWidestPanel = 256 / sizeof(T);
  static constexpr bool kInPlace = std::is_same_v<S, T>;  // do products sum up in y?

  struct Pack {
    const T* w;
    int64_t k_step, j_step, depth, columns;
    T* packed;  // [panel][depth][kPanel]

    template <int kBytes>
    static MEMDENSE_INLINE void run(const Pack& a, int64_t first, int64_t last) {
      constexpr int64_t panel = Simd<T, kBytes>::kPanel;
      for (int64_t p = first; p < last; ++p) {
        pack_panel<T, kBytes>(a.w + p * panel * a.j_step, a.k_step, a.j_step, a.depth,
                              std::min(panel, a.columns - p * panel),
                              a.packed + p * a.depth * panel);
      }
    }
  };

  static int64_t panel() {
    return (register_bytes() == 64 ? 4 : 2) * register_bytes() / static_cast<int64_t>(sizeof(T));
  }
  int64_t panels() const { return pieces(columns, panel()); }
  int64_t packed_values() const { return panels() * panel() * depth; }

  Tensor packed;
  T* b;
};

class OnTiles : RightSide {
  static constexpr int64_t kPanel = 64;

 public:
  using Value = amx::Value;
  static constexpr int64_t kUnit = amx::kSquare, kTileRows = 192;

  using RightSide::RightSide;

  void pack(const Tensor& weight) {
    const BFloat16* w = matrix<const BFloat16>(weight, outputs, channels, "weight");
    packed = make<BFloat16>({column_tiles() * b_tile()});
    b = static_cast<BFloat16*>(packed.data_ptr());
    const Pack work{w, weight.stride(0), depth, columns, transposed};
    Workers(column_tiles()).run([&](int64_t, int64_t first, int64_t last) {
      amx::run<Pack>(work, first, last, b);
    });
  }

  int64_t packed_bytes() const { return column_tiles() * b_tile() * sizeof(BFloat16); }
  int64_t packing_bytes() const { return 0; }

  template <typename Kernel, typename... Args>
  static void run(const Args&... args) {
    const amx::Configuration tiles;
    amx::run<Kernel>(args...);
  }

  int64_t forward_scratch() const { return kTileRows * row() / 2 + amx::kSquare * width(); }

  template <int kBytes, typename Read>
  MEMDENSE_INLINE void forward(const Read& read, int64_t rows, BFloat16* y, float* sums) const {
    Value* z = reinterpret_cast<Value*>(sums + amx::kSquare * width());
    read(0, depth, z, row());
    for (int64_t i = 0; i < rows; i += amx::kSquare) {
      for (int64_t j = 0; j < columns; j += amx::kSquare) {
        product(z, i, rows, j, columns, sums + j, width());
      }
      const int64_t last = std::min(amx::kSquare, rows - i);
      for (int64_t r = 0; r < last; ++r) {
        for_columns<float, kBytes, 1>(0, columns,
                                      [&]<typename Vec, int>(int64_t j) MEMDENSE_INLINE_LAMBDA {
                                        store(static_cast<Value*>(y + (i + r) * columns + j),
                                              load<Vec>(sums + r * width() + j));
                                      });
      }
    }
  }

  int64_t dy_row() const { return row(); }
  int64_t backward_scratch() const {
    return kTileRows * (2 * kPanel + (row() + height()) / 2) + height() * kPanel;
  }

  template <int kBytes>
  struct Buffers {
    static constexpr int64_t panel = kPanel;
    float *sums, *da;
    Value *z, *z_pairs, *dy, *dy_transposed;

    MEMDENSE_INLINE Buffers(const OnTiles& of, float* scratch)
        : sums(scratch),
          da(sums + of.height() * kPanel),
          z(reinterpret_cast<Value*>(da + kTileRows * kPanel)),
          z_pairs(z + kTileRows * kPanel),
          dy(z_pairs + kTileRows * kPanel),
          dy_transposed(dy + kTileRows * of.dy_row()) {}
  };

  template <int kBytes>
  MEMDENSE_INLINE void incoming(const Buffers<kBytes>& at, int64_t rows, bool for_weight) const {
    if (!for_weight) return;
    amx::pair_rows<kBytes>(at.dy, dy_row(), rows, round_up(rows, amx::kDepth), depth,
                           at.dy_transposed, kRowTiles);
    for (int64_t i = 0; i < depth; i += amx::kSide) {
      for (int64_t k = 0; k < rows; k += amx::kDepth) {
        amx::transpose_pairs<kBytes>(at.dy_transposed + (i / amx::kSide) * kRowTiles +
                                     k / amx::kDepth * amx::kTile);
      }
    }
  }

  template <int kBytes>
  MEMDENSE_INLINE void da(const Buffers<kBytes>& at, int64_t rows, int64_t j, int64_t count) const {
    for (int64_t i = 0; i < rows; i += amx::kSquare) {
      for (int64_t c = 0; c < count; c += amx::kSquare) {
        product(at.dy, i, rows, j + c, j + count, at.da + i * kPanel + c, kPanel);
      }
    }
  }

  template <int kBytes>
  MEMDENSE_INLINE void dweight(const Buffers<kBytes>& at, int64_t rows, int64_t j, int64_t count,
                               float* dw, bool add) const {
    amx::pair_rows<kBytes>(at.z, kPanel, rows, round_up(rows, amx::kDepth), count, at.z_pairs,
                           kRowTiles);
    for (int64_t i = 0; i < depth; i += amx::kSquare) {
      for (int64_t c = 0; c < count; c += amx::kSquare) {
        const amx::Segment segment{at.dy_transposed + i / amx::kSide * kRowTiles,
                                   at.z_pairs + c / amx::kSide * kRowTiles};
        amx::multiply(amx::tile_count(i, depth), amx::tile_count(c, count),
                      {.segments = &segment,
                       .count = 1,
                       .steps = pieces(rows, amx::kDepth),
                       .a_row = amx::kDepth,
                       .a_tile = kRowTiles,
                       .a_step = amx::kTile,
                       .b_tile = kRowTiles,
                       .b_step = amx::kTile,
                       .out = at.sums + i * kPanel + c,
                       .out_row = kPanel,
                       .out_tile = amx::kSide * kPanel,
                       .accumulate = false});
      }
    }
    for (int64_t i = 0; i < depth; ++i) {
      float* to = dw + i * columns + j;
      const float* from = at.sums + i * kPanel;
      for_columns<float, kBytes, 1>(0, count,
                                    [&]<typename Vec, int>(int64_t c) MEMDENSE_INLINE_LAMBDA {
                                      const Vec sum = load<Vec>(from + c);
                                      store(to + c, add ? load<Vec>(to + c) + sum : sum);
                                    });
    }
  }

 private:
  static constexpr int64_t kRowTiles = kTileRows * amx::kSide;  // values, of 16 columns

  struct Pack {
    const BFloat16* w;
    int64_t w_row, depth, columns;
    bool transposed;

    template <int kBytes>
    static MEMDENSE_INLINE void run(const Pack& a, int64_t first, int64_t last, BFloat16* packed) {
      const int64_t b_tile = round_up(a.depth, amx::kDepth) * amx::kSide;
      const int64_t j = first * amx::kSide, end = std::min(last * amx::kSide, a.columns);
      BFloat16* out = packed + first * b_tile;
      if (a.transposed)
        amx::pair_columns<kBytes>(a.w + j * a.w_row, a.w_row, a.depth, end - j, out, b_tile);
      else
        amx::pair_rows<kBytes>(a.w + j, a.w_row, a.depth, round_up(a.depth, amx::kDepth), end - j,
                               out, b_tile);
    }
  };

  // Of whole products.
  int64_t width() const { return round_up(columns, amx::kSquare); }
  int64_t height() const { return round_up(depth, amx::kSquare); }

  int64_t b_tile() const { return round_up(depth, amx::kDepth) * amx::kSide; }

  // Values from a row of a to the next: whole steps, and an odd number of them, since rows a power
  // of two apart would share cache sets.
  int64_t row() const { return (pieces(depth, amx::kDepth) | 1) * amx::kDepth; }

  // out = a @ b, rows i.. up to `rows` of a by columns j.. up to `last` of b, a square at most.
  MEMDENSE_INLINE void product(const BFloat16* a, int64_t i, int64_t rows, int64_t j, int64_t last,
                               float* out, int64_t out_row) const {
    const amx::Segment segment{a + i * row(), b + j / amx::kSide * b_tile()};
    amx::multiply(amx::tile_count(i, rows), amx::tile_count(j, last),
                  {.segments = &segment,
                   .count = 1,
                   .steps = pieces(depth, amx::kDepth),
                   .a_row = row(),
                   .a_tile = amx::kSide * row(),
                   .a_step = amx::kDepth,
                   .b_tile = b_tile(),
                   .b_step = amx::kTile,
                   .out = out,
                   .out_row = out_row,
                   .out_tile = amx::kSide * out_row,
                   .accumulate = false});
  }

  int64_t column_tiles() const { return pieces(columns, amx::kSide); }

  Tensor packed;
  BFloat16* b;
};

}  // namespace memdense
