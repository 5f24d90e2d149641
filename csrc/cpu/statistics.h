// Values as kernels load them, and statistics of rows that come in pieces.
#pragma once

#include <cstdint>
#include <cstring>

namespace memdense {

struct BFloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }
// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = value != value ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

struct Rows {
  int64_t rows, columns, row_stride;
};

// Mean and m2 = sum (x - mean)^2 of `count` values take in those of `n` more.
inline void merge(double count, double& mean, double& m2, double n, double n_mean, double n_m2) {
  const double delta = n_mean - mean;
  mean += delta * (n / (count + n));
  m2 += n_m2 + delta * delta * (count * n / (count + n));
}

// Merges more rows into mean[c] and m2[c] of the `count` rows before them.
template <typename T>
void merge_rows(const T* x, Rows rows, int64_t count, double* mean, double* m2);

}  // namespace memdense
