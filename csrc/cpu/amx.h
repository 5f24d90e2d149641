// Products of float matrices on AMX's tiles of bfloat16, as exact as products in float.
//
// A float is the sum of three bfloat16, x = x1 + x2 + x3: x rounded, what that leaves rounded, and
// the rest, which fits. So
//
//   a * b = a1*b1 + (a1*b2 + a2*b1) + (a1*b3 + a2*b2 + a3*b1)    up to 2^-25 of it,
//
// six products, of which a tile instruction does sixteen times as many as AVX-512 does of floats;
// it sums 32 of them in float before it adds to what is there. Parts below 2^-126 count as 0, and
// an infinity becomes NaN, as does what rounds to one (from 3.396e38 on).
#pragma once

#include <cstdint>

namespace memdense {
namespace amx {

using Half = uint16_t;  // a bfloat16's bits

constexpr int64_t kRows = 16, kColumns = 16;  // of a tile of results
constexpr int64_t kDepth = 32;                // products that an instruction adds to each
constexpr int64_t kTile = kDepth * kColumns;  // values of a tile of b
constexpr int64_t kParts = 3;                 // of a value

// Has the processor got them, and does ATEN_CPU_CAPABILITY ask for nothing less?
bool available();

// This thread's tiles, while it lives: those of a and of results have `rows` rows.
struct Configuration {
  explicit Configuration(int64_t rows);
  ~Configuration();
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

struct Segment {
  const Half* a;
  const Half* b;
};

// out (+)= sum over segments and steps < length of a @ b, for one or two tiles of rows by one or
// two of columns. A tile of a has rows of 32 values, a_row apart; a tile of b is dense: 16 rows of
// 16 pairs, b[2r][j] beside b[2r + 1][j]. Strides are in values.
struct Product {
  const Segment* segments;
  int64_t count, length;
  int64_t a_row, a_tile, a_part, a_step;
  int64_t b_tile, b_part, b_step;
  float* out;
  int64_t out_row, out_tile;  // out_tile: between tiles of rows
  bool accumulate;
};

void multiply(int64_t row_tiles, int64_t column_tiles, const Product& product);

// A matrix whose parts are wanted: of x, or of relu(scale * x + shift).
struct Matrix {
  const float* x;
  int64_t row, rows, columns;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// As a: rows of 32 columns each. Columns beyond the last are 0.
struct Rows {
  Half* data;
  int64_t block, part;  // from 32 columns to the next, from a part to the next
};
void split_rows(const Matrix& from, const Rows& out);

// As b, its rows from the first_row-th on, an even one. Rows up to `padded`, and columns beyond the
// last, are 0.
struct Pairs {
  Half* data;
  int64_t step, tile, part;  // from 32 rows to the next, from 16 columns to the next
  int64_t first_row = 0;
};
void split_pairs(const Matrix& from, int64_t padded, const Pairs& out);

// What split_pairs made, `rows` pairs of all tiles and parts one behind the other, paired anew: the
// second of a pair beside the first of the next.
void shift_pairs(const Half* from, int64_t rows, Half* to);

// A matrix's transpose as a: the columns become rows, `row` values apart. Rows up to the next
// multiple of 32 behind `padded`, and columns up to the next multiple of 16, are 0.
struct Transposed {
  Half* data;
  int64_t row, part;
};
void split_transposed(const Matrix& from, int64_t padded, const Transposed& out);

}  // namespace amx
}  // namespace memdense
