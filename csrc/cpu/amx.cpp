#include "amx.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>

#include "gemm.h"
#include "vector.h"

// Clang has no tiles of AVX-512's width beside it (tile.cpp).
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 11
#define MEMDENSE_AMX 1
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define MEMDENSE_AMX 0
#endif

namespace memdense {
namespace amx {

#if MEMDENSE_AMX

#define MEMDENSE_AMX_TARGET __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))

bool available() {
  static const bool yes = [] {
    constexpr unsigned kTileUnit = 1u << 24, kBFloat16 = 1u << 22;  // of cpuid 7, in edx
    constexpr long kRequest = 0x1023, kTileData = 18;               // ask Linux for tiles
    unsigned a, b, c, d = 0;
    return register_bytes() == 64 && !std::getenv("ATEN_CPU_CAPABILITY") &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileUnit) && (d & kBFloat16) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return yes;
}

namespace {

MEMDENSE_AMX_TARGET void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } tiles;
  for (int i = 0; i < 8; ++i) {
    tiles.bytes[i] = 64;
    tiles.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kRows);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles));  // the intrinsic of some compilers drops stores
}

MEMDENSE_AMX_TARGET void release() { _tile_release(); }

// Steps between two stores of a tile: after 0.6 us without any, the next one takes 0.25 us longer
// (measured on an Intel Xeon).
constexpr int64_t kAwake = 4;

// Tiles 0 to 3 hold results, 4 and 5 a's, 6 and 7 b's.
template <int kM, int kN>
struct Quad {
  static MEMDENSE_AMX_TARGET MEMDENSE_INLINE void load_a(const char* a, int64_t tile, int64_t row) {
    _tile_loadd(4, a, row);
    if constexpr (kM == 2) _tile_loadd(5, a + tile, row);
  }
  static MEMDENSE_AMX_TARGET MEMDENSE_INLINE void load_b(const char* b, int64_t tile) {
    _tile_loadd(6, b, 64);
    if constexpr (kN == 2) _tile_loadd(7, b + tile, 64);
  }
  static MEMDENSE_AMX_TARGET MEMDENSE_INLINE void add() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kM == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kM == 2 && kN == 2) _tile_dpbf16ps(3, 5, 7);
  }

  static MEMDENSE_AMX_TARGET void run(const Product& p) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t a_row = 2 * p.a_row, a_tile = 2 * p.a_tile, a_part = 2 * p.a_part;
    const int64_t b_tile = 2 * p.b_tile, b_part = 2 * p.b_part;
    alignas(64) float sums[4][kRows * kColumns];
    int64_t taken = 0;
    for (int64_t step = 0; step < p.length; ++step) {
      for (int64_t s = 0; s < p.count; ++s) {
        const char* a = reinterpret_cast<const char*>(p.segments[s].a + step * p.a_step);
        const char* b = reinterpret_cast<const char*>(p.segments[s].b + step * p.b_step);
        // one operand changes at a time
        load_b(b, b_tile);
        load_a(a, a_tile, a_row);
        add();
        load_a(a + 2 * a_part, a_tile, a_row);
        add();
        load_a(a + a_part, a_tile, a_row);
        add();
        load_b(b + b_part, b_tile);
        add();
        load_a(a, a_tile, a_row);
        add();
        load_b(b + 2 * b_part, b_tile);
        add();
        if (++taken % kAwake == 0) _tile_stored(6, sums[0], 64);
      }
    }
    const int64_t out_row = p.out_row * sizeof(float);
    float* below = p.out + p.out_tile;
    if (!p.accumulate) {
      _tile_stored(0, p.out, out_row);
      if constexpr (kN == 2) _tile_stored(1, p.out + kColumns, out_row);
      if constexpr (kM == 2) _tile_stored(2, below, out_row);
      if constexpr (kM == 2 && kN == 2) _tile_stored(3, below + kColumns, out_row);
      return;
    }
    // short chains round less
    _tile_stored(0, sums[0], 64);
    if constexpr (kN == 2) _tile_stored(1, sums[1], 64);
    if constexpr (kM == 2) _tile_stored(2, sums[2], 64);
    if constexpr (kM == 2 && kN == 2) _tile_stored(3, sums[3], 64);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) {
          float* to = p.out + m * p.out_tile + i * p.out_row + n * kColumns;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to),
                                             _mm512_load_ps(sums[2 * m + n] + i * kColumns)));
        }
      }
    }
  }
};

// Sixteen values in parts; the upper half of each word is the bfloat16.
struct Parts {
  __m512i part[kParts];
};

MEMDENSE_AMX_TARGET MEMDENSE_INLINE Parts split(__m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
  Parts parts;
  for (int i = 0; i < 2; ++i) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), half);
    parts.part[i] = _mm512_and_si512(rounded, upper);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(parts.part[i]));
  }
  parts.part[2] = _mm512_castps_si512(x);
  return parts;
}

// Sixteen columns of a row; 0 beyond the last of either.
MEMDENSE_AMX_TARGET MEMDENSE_INLINE __m512 read(const Matrix& from, int64_t row, int64_t column) {
  const int64_t left = row < from.rows ? std::clamp<int64_t>(from.columns - column, 0, 16) : 0;
  const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
  const __m512 x = _mm512_maskz_loadu_ps(inside, from.x + row * from.row + column);
  if (!from.scale) return x;
  const __m512 z = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(inside, from.scale + column),
                                   _mm512_maskz_loadu_ps(inside, from.shift + column));
  // not max: NaN stays
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLT_UQ) & inside, z);
}

MEMDENSE_AMX_TARGET MEMDENSE_INLINE void store(const Parts& parts, Half* to, int64_t part) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(to + i * part, parts.part[i]);
}

// The bfloat16 of one vector behind the other's.
MEMDENSE_AMX_TARGET MEMDENSE_INLINE Parts side_by_side(const Parts& left, const Parts& right) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  Parts both;
  for (int i = 0; i < kParts; ++i) {
    both.part[i] = _mm512_permutex2var_epi16(left.part[i], upper, right.part[i]);
  }
  return both;
}

// Each bfloat16 of one vector before the other's.
MEMDENSE_AMX_TARGET MEMDENSE_INLINE Parts alternating(const Parts& even, const Parts& odd) {
  Parts both;
  for (int i = 0; i < kParts; ++i) {
    both.part[i] =
        _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even.part[i], 16), odd.part[i]);
  }
  return both;
}

}  // namespace

Configuration::Configuration(int64_t rows) { configure(rows); }
Configuration::~Configuration() { release(); }

void multiply(int64_t row_tiles, int64_t column_tiles, const Product& product) {
  if (row_tiles == 2) {
    column_tiles == 2 ? Quad<2, 2>::run(product) : Quad<2, 1>::run(product);
  } else {
    column_tiles == 2 ? Quad<1, 2>::run(product) : Quad<1, 1>::run(product);
  }
}

MEMDENSE_AMX_TARGET void split_rows(const Matrix& from, const Rows& out) {
  for (int64_t r = 0; r < from.rows; ++r) {
    Half* to = out.data + r * kDepth;
    for (int64_t c = 0; c < from.columns; c += kDepth, to += out.block) {
      store(side_by_side(split(read(from, r, c)), split(read(from, r, c + 16))), to, out.part);
    }
  }
}

MEMDENSE_AMX_TARGET void split_pairs(const Matrix& from, int64_t padded, const Pairs& out) {
  for (int64_t r = 0; r < padded; r += 2) {
    const int64_t row = out.first_row + r;
    Half* to = out.data + row / kDepth * out.step + row % kDepth * kColumns;
    for (int64_t c = 0; c < from.columns; c += kColumns, to += out.tile) {
      store(alternating(split(read(from, r, c)), split(read(from, r + 1, c))), to, out.part);
    }
  }
}

MEMDENSE_AMX_TARGET void shift_pairs(const Half* from, int64_t rows, Half* to) {
  __m512i pair = _mm512_loadu_si512(from);
  for (int64_t r = 0; r < rows; ++r, to += kDepth) {
    from += kDepth;
    const __m512i next = r + 1 < rows ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(pair, 16),
                                                    _mm512_slli_epi32(next, 16)));
    pair = next;
  }
}

MEMDENSE_AMX_TARGET void split_transposed(const Matrix& from, int64_t padded,
                                          const Transposed& out) {
  for (int64_t c = 0; c < from.columns; c += 16) {
    for (int64_t r = 0; r < padded; r += kDepth) {
      Simd<float, 64>::Vec half[2][16];
      for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) half[h][i] = read(from, r + 16 * h + i, c);
        transpose<float, 64>(half[h]);
      }
      Half* to = out.data + c * out.row + r;
      for (int i = 0; i < 16; ++i, to += out.row) {
        store(side_by_side(split(half[0][i]), split(half[1][i])), to, out.part);
      }
    }
  }
}

#else

bool available() { return false; }
Configuration::Configuration(int64_t) {}
Configuration::~Configuration() {}
void multiply(int64_t, int64_t, const Product&) {}
void split_rows(const Matrix&, const Rows&) {}
void split_pairs(const Matrix&, int64_t, const Pairs&) {}
void shift_pairs(const Half*, int64_t, Half*) {}
void split_transposed(const Matrix&, int64_t, const Transposed&) {}

#endif

namespace {

int64_t register_bytes() { return available() ? 1024 : memdense::register_bytes(); }

}  // namespace
}  // namespace amx
}  // namespace memdense

STABLE_TORCH_LIBRARY_IMPL(memdense, CompositeExplicitAutograd, m) {
  m.impl("register_bytes", TORCH_BOX(&memdense::amx::register_bytes));
}
