// Values as they are stored, vectors of any width, and one source compiled per instruction set with
// run-time dispatch.
//
// A kernel is a struct with `template <int kBytes> static void run(...)`, kBytes the width of a
// register. dispatch<Kernel>(...) runs it compiled for the machine's best instruction set. For
// that, run() and all it calls must be inlined: mark them MEMDENSE_INLINE, lambdas too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEMDENSE_X86 1
#else
#define MEMDENSE_X86 0
#endif

#ifdef __GNUC__
// Vectors wider than the baseline's only pass through functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define MEMDENSE_INLINE inline __attribute__((always_inline))
// A lambda's attribute stands behind its parameters.
#define MEMDENSE_INLINE_LAMBDA __attribute__((always_inline))

// Of the loop behind it, that no step reads what another one writes.
#ifdef __clang__
#define MEMDENSE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define MEMDENSE_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace memdense {

constexpr int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }
constexpr int64_t round_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

struct BFloat16 {
  uint16_t bits;
};

MEMDENSE_INLINE float load(float value) { return value; }
MEMDENSE_INLINE double load(double value) { return value; }
MEMDENSE_INLINE float load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

MEMDENSE_INLINE void store(float& to, float value) { to = value; }
MEMDENSE_INLINE void store(double& to, double value) { to = value; }
// Rounds to nearest, ties to even; NaN stays NaN.
MEMDENSE_INLINE void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = value != value ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

// What kernels compute in.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename T, int kBytes>
struct Simd {
  typedef T Vec __attribute__((vector_size(kBytes)));
  static constexpr int64_t kLanes = kBytes / sizeof(T);
  using Square = Vec[kLanes];
  // The columns of a panel, in vectors: with 6 rows, 24 of AVX-512's 32 registers or 12 of 16.
  static constexpr int kVectors = kBytes == 64 ? 4 : 2;
  static constexpr int64_t kPanel = kVectors * kLanes;
};

// A vector in memory, aligned as a single value: slices of wider buffers begin anywhere. Template
// arguments lose such attributes, so it is made where it is used.
template <typename Vec, typename T>
MEMDENSE_INLINE Vec load(const T* p) {
  typedef Vec There __attribute__((aligned(alignof(T)), may_alias));
  return *reinterpret_cast<const There*>(p);
}

template <typename Vec, typename T>
MEMDENSE_INLINE void store(T* p, const Vec& v) {
  typedef Vec There __attribute__((aligned(alignof(T)), may_alias));
  *reinterpret_cast<There*>(p) = v;
}

// As many 16-bit values, and the bits of a float, as a vector of floats has lanes.
template <typename Vec>
struct Bits {
  static constexpr int64_t kLanes = sizeof(Vec) / sizeof(float);
  typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Long __attribute__((vector_size(4 * kLanes)));
};

template <typename Vec>
MEMDENSE_INLINE typename Bits<Vec>::Long widen(const BFloat16* p) {
  using Of = Bits<Vec>;
  typedef typename Of::Short There __attribute__((aligned(alignof(BFloat16)), may_alias));
  const There& bits = *reinterpret_cast<const There*>(p);
#if MEMDENSE_X86 && !defined(__clang__)
  if constexpr (sizeof(Vec) == 64) {
    typename Of::Long wide;  // GCC 12 does it by halves
    __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "m"(bits));
    return wide;
  }
#endif
  return __builtin_convertvector(bits, typename Of::Long);
}

template <typename Vec>
MEMDENSE_INLINE Vec load(const BFloat16* p) {
  return (Vec)(widen<Vec>(p) << 16);
}

template <typename Vec>
MEMDENSE_INLINE void store(BFloat16* p, const Vec& v) {
  using Of = Bits<Vec>;
  const auto bits = (typename Of::Long)v;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto kept = v != v ? typename Of::Long{} + 0x7fc0 : rounded;
  store(&p->bits, __builtin_convertvector(kept, typename Of::Short));
}

template <int64_t kLanes>
struct Bytes {
  typedef uint8_t Vec __attribute__((vector_size(kLanes)));
};

// 0 or 1 of each.
template <typename Vec>
MEMDENSE_INLINE Vec load_bools(const bool* p) {
  using Bools = typename Bytes<sizeof(Vec) / sizeof(std::declval<Vec>()[0])>::Vec;
  return __builtin_convertvector(load<Bools>(reinterpret_cast<const uint8_t*>(p)), Vec);
}

// f.operator()<Vec, kCount>(column) for all columns: first kCount whole vectors at a time, then
// single ones, then ever shorter ones down to one value.
template <typename T, int kBytes, int kCount, typename F>
MEMDENSE_INLINE void for_columns(int64_t column, int64_t last, const F& f) {
  using V = Simd<T, kBytes>;
  for (; column + kCount * V::kLanes <= last; column += kCount * V::kLanes) {
    f.template operator()<typename V::Vec, kCount>(column);
  }
  if constexpr (kCount > 1) {
    for_columns<T, kBytes, 1>(column, last, f);
  } else if constexpr (V::kLanes > 1) {
    if (column < last) for_columns<T, kBytes / 2, 1>(column, last, f);
  }
}

// A square of vectors, transposed by interleaving one half with the other, again and again.
template <typename T, int kBytes>
MEMDENSE_INLINE void transpose(typename Simd<T, kBytes>::Square& rows) {
  constexpr int kLanes = Simd<T, kBytes>::kLanes;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const T value = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = value;
    }
  }
#else
  using Index = std::conditional_t<sizeof(T) == 8, int64_t,
                                   std::conditional_t<sizeof(T) == 2, int16_t, int32_t> >;
  typename Simd<Index, kBytes>::Vec low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    typename Simd<T, kBytes>::Square mixed;
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
#endif
}

// out[i * out_row + j] = from[i + j * from_column] for i < rows and j < columns: squares of it, and
// what they leave.
template <typename T, int kBytes>
MEMDENSE_INLINE void transpose(const T* from, int64_t from_column, int64_t rows, int64_t columns,
                               T* out, int64_t out_row) {
  using Vec = typename Simd<T, kBytes>::Vec;
  constexpr int kLanes = Simd<T, kBytes>::kLanes;
  const int64_t square_rows = rows / kLanes * kLanes, square_columns = columns / kLanes * kLanes;
  for (int64_t i = 0; i < square_rows; i += kLanes) {
    for (int64_t j = 0; j < square_columns; j += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int v = 0; v < kLanes; ++v) square[v] = load<Vec>(from + i + (j + v) * from_column);
      transpose<T, kBytes>(square);
#pragma GCC unroll 16
      for (int v = 0; v < kLanes; ++v) store(out + (i + v) * out_row + j, square[v]);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < square_columns ? square_rows : 0; i < rows; ++i) {
      out[i * out_row + j] = from[i + j * from_column];
    }
  }
}

// Register width to use. ATEN_CPU_CAPABILITY lowers it as it does PyTorch's: default, avx2.
inline int register_bytes() {
  static const int bytes = [] {
#if MEMDENSE_X86
    const char* name = std::getenv("ATEN_CPU_CAPABILITY");
    const bool baseline = name && !std::strcmp(name, "default");
    const bool avx2 = name && !std::strcmp(name, "avx2");
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && !baseline && !avx2) return 64;
    if (has_avx2 && !baseline) return 32;
#endif
    return 16;
  }();
  return bytes;
}

#if MEMDENSE_X86
// What register_bytes() asks for. Names of whole levels, like x86-64-v3, are too new for many
// compilers.
#define MEMDENSE_AVX2 "avx2,fma,bmi2"
#define MEMDENSE_AVX512 MEMDENSE_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"

template <typename Kernel, typename... Args>
__attribute__((target(MEMDENSE_AVX512))) void run_avx512(const Args&... args) {
  Kernel::template run<64>(args...);
}
template <typename Kernel, typename... Args>
__attribute__((target(MEMDENSE_AVX2))) void run_avx2(const Args&... args) {
  Kernel::template run<32>(args...);
}
#endif

template <typename Kernel, typename... Args>
void dispatch(const Args&... args) {
#if MEMDENSE_X86
  if (register_bytes() == 64) return run_avx512<Kernel, Args...>(args...);
  if (register_bytes() == 32) return run_avx2<Kernel, Args...>(args...);
#endif
  Kernel::template run<16>(args...);
}

}  // namespace memdense
