// The register-blocked multiplication under the convolutions: one small tile of a matrix product.
#pragma once

#include <cstdint>

namespace memdense {

template <typename T>
struct Segment {
  const T* a;
  const T* b;
};

// out[i, j] = sum over segments s and r < length of a_s[i * a_row + r * a_step] * b_s[r * b_step +
// j] for i < rows and j < vectors * lanes; added to out where `accumulate`. Either a_row or a_step
// is 1.
template <typename T>
struct Tile {
  const Segment<T>* segments;
  int64_t count, length;
  int64_t a_row, a_step, b_step;
  T* out;
  int64_t out_row;
  bool accumulate;
};

template <typename T>
struct TileKernels {
  int lanes;        // values in a vector
  int max_vectors;  // of a tile's width: 2, or 3 where one would be left over
  int max_rows[4];  // as many as keep a tile of 1, 2 or 3 vectors in registers
  void (*run)(int rows, int vectors, const Tile<T>& tile);
};

// For the width of register_bytes().
template <typename T>
const TileKernels<T>& tile_kernels();

}  // namespace memdense
