#include "amx.h"

#include <cstdlib>

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

#define MEMDENSE_AMX_TARGET __attribute__((target(MEMDENSE_AVX512 ",amx-tile,amx-bf16")))

bool available() {
  static const bool yes = [] {
    constexpr unsigned kTiles = 1u << 24 | 1u << 22;   // and their bfloat16: cpuid 7.0, edx
    constexpr unsigned kRounding = 1u << 5;            // of vectors to bfloat16: cpuid 7.1, eax
    constexpr long kRequest = 0x1023, kTileData = 18;  // ask Linux for tiles
    unsigned eax = 0, ebx, ecx, edx = 0;
    const auto cpuid = [&](unsigned subleaf) {
      return __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx);
    };
    return register_bytes() == 64 && !std::getenv("ATEN_CPU_CAPABILITY") && cpuid(0) &&
           (edx & kTiles) == kTiles && cpuid(1) && (eax & kRounding) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return yes;
}

MEMDENSE_AMX_TARGET Configuration::Configuration(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } tiles;
  for (int i = 0; i < 8; ++i) {
    tiles.bytes[i] = 64;
    tiles.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kSide);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(tiles));  // the intrinsic of some compilers drops stores
}

namespace {

MEMDENSE_AMX_TARGET void release() { _tile_release(); }

// Tiles 0 to 3 hold sums, 4 and 5 a's, 6 and 7 b's.
template <int kRows, int kColumns>
MEMDENSE_AMX_TARGET void multiply(const Product& p) {
  constexpr int64_t kValue = sizeof(BFloat16), kTileRow = kDepth * kValue;
  __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read what was stored
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t a_row = p.a_row * kValue;
  for (int64_t step = 0; step < p.steps; ++step) {
    for (int64_t s = 0; s < p.count; ++s) {
      const BFloat16* a = p.segments[s].a + step * p.a_step;
      const BFloat16* b = p.segments[s].b + step * p.b_step;
      _tile_loadd(4, a, a_row);
      if constexpr (kRows == 2) _tile_loadd(5, a + p.a_tile, a_row);
      _tile_loadd(6, b, kTileRow);
      if constexpr (kColumns == 2) _tile_loadd(7, b + p.b_tile, kTileRow);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  if (!p.accumulate) {
    const int64_t out_row = p.out_row * sizeof(float);
    float* below = p.out + p.out_tile;
    _tile_stored(0, p.out, out_row);
    if constexpr (kColumns == 2) _tile_stored(1, p.out + kSide, out_row);
    if constexpr (kRows == 2) _tile_stored(2, below, out_row);
    if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, below + kSide, out_row);
    return;
  }
  // short chains round less
  alignas(64) float sums[4][kSide * kSide];
  _tile_stored(0, sums[0], kTileRow);
  if constexpr (kColumns == 2) _tile_stored(1, sums[1], kTileRow);
  if constexpr (kRows == 2) _tile_stored(2, sums[2], kTileRow);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, sums[3], kTileRow);
  for (int64_t i = 0; i < kSide; ++i) {
    for (int m = 0; m < kRows; ++m) {
      for (int n = 0; n < kColumns; ++n) {
        float* to = p.out + m * p.out_tile + i * p.out_row + n * kSide;
        _mm512_storeu_ps(
            to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums[2 * m + n] + i * kSide)));
      }
    }
  }
}

}  // namespace

Configuration::~Configuration() { release(); }

void multiply(int64_t row_tiles, int64_t column_tiles, const Product& product) {
  if (row_tiles == 2) {
    column_tiles == 2 ? multiply<2, 2>(product) : multiply<2, 1>(product);
  } else {
    column_tiles == 2 ? multiply<1, 2>(product) : multiply<1, 1>(product);
  }
}

#else

bool available() { return false; }
Configuration::Configuration(int64_t) {}
Configuration::~Configuration() {}
void multiply(int64_t, int64_t, const Product&) {}

#endif

}  // namespace amx
}  // namespace memdense
