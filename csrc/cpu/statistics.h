// Statistics of rows that come in pieces.
#pragma once

#include <cstdint>

namespace memdense {

struct Rows {
  int64_t rows, columns, row_stride;
};

// Mean and m2 = sum (x - mean)^2 of `count` values take in those of `n` more.
inline void merge(double count, double& mean, double& m2, double n, double n_mean, double n_m2) {
  const double delta = n_mean - mean;
  mean += delta * (n / (count + n));
  m2 += n_m2 + delta * (delta * (count * n / (count + n)));  // 0 of a first piece, whatever delta
}

// Merges more rows into mean[c] and m2[c] of the `count` rows before them.
template <typename T>
void merge_rows(const T* x, Rows rows, int64_t count, double* mean, double* m2);

}  // namespace memdense
