// Products of bfloat16 pairs, summed in float32, and how their operands are laid out.
//
// The instruction multiplies two neighbouring bfloat16 values of either operand and adds both
// products to a float32 lane. So a product over an index i wants its right operand as "pairs":
// 32-bit words that hold i and i + 1, [i / 2][lanes]; of the left operand one word at a time is
// spread over all lanes. A tile of TILE rows and up to 64 lanes of sums stays in registers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pairs {

constexpr int LANES = 16;
constexpr int VECTORS = 4;  // of a tile's rows
constexpr int PANEL = LANES * VECTORS;
constexpr int TILE = 6;  // rows; 24 registers of sums

// A bfloat16 or float32 tensor [batch, heads, length, size]; the last index is contiguous.
struct View {
  void* data;
  int64_t strides[3];  // elements
  int64_t wide;        // whether it is float32

  int64_t at(int64_t batch, int64_t head, int64_t row) const {
    return batch * strides[0] + head * strides[1] + row * strides[2];
  }
};

// Sixteen values as bfloat16.
inline __m256i read(const View& view, int64_t at) {
  if (view.wide)
    return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(static_cast<const float*>(view.data) + at));
  const auto* from = static_cast<const uint16_t*>(view.data) + at;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline void write(const View& view, int64_t at, __m512 values) {
  if (view.wide) {
    _mm512_storeu_ps(static_cast<float*>(view.data) + at, values);
  } else {
    auto* to = static_cast<uint16_t*>(view.data) + at;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
  }
}

inline __m512 widened(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// Some rows of one head.
struct Rows {
  const View* view;
  int64_t batch, head, first, count, size;

  __m256i load(int64_t row, int64_t column) const {
    return read(*view, view->at(batch, head, first + row) + column);
  }
};

// bfloat16 [padded][size]; rows past the last are zero.
inline void pack_rows(const Rows& rows, int64_t padded, uint16_t* out) {
  for (int64_t row = 0; row < rows.count; ++row)
    for (int64_t d = 0; d < rows.size; d += LANES)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * rows.size + d), rows.load(row, d));
  std::fill(out + rows.count * rows.size, out + padded * rows.size, uint16_t{0});
}

// Pairs of rows, [padded / 2][size]; rows past the last are zero.
inline void pack_row_pairs(const Rows& rows, int64_t padded, uint32_t* out) {
  for (int64_t row = 0; row < rows.count; row += 2)
    for (int64_t d = 0; d < rows.size; d += LANES) {
      const __m512i even = _mm512_cvtepu16_epi32(rows.load(row, d));
      const __m512i odd = row + 1 < rows.count ? _mm512_cvtepu16_epi32(rows.load(row + 1, d))
                                               : _mm512_setzero_si512();
      _mm512_storeu_si512(out + row / 2 * rows.size + d,
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  std::fill(out + (rows.count + 1) / 2 * rows.size, out + padded / 2 * rows.size, 0u);
}

// Pairs of columns with rows as lanes, in panels of 64 rows: [panels][size / 2][64].
inline void pack_panels(const Rows& rows, int64_t panels, uint32_t* out) {
  const int64_t words = rows.size / 2;
  uint32_t line[LANES / 2];
  for (int64_t row = 0; row < panels * PANEL; ++row) {
    uint32_t* lane = out + row / PANEL * words * PANEL + row % PANEL;
    for (int64_t d = 0; d < rows.size; d += LANES) {
      const __m256i values = row < rows.count ? rows.load(row, d) : _mm256_setzero_si256();
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(line), values);
      for (int64_t k = 0; k < LANES / 2; ++k) lane[(d / 2 + k) * PANEL] = line[k];
    }
  }
}

// The left operand: TILE rows of words, and how far it is from one row or pair to the next.
struct Left {
  const uint32_t* words;
  int64_t row_step, pair_step;
};

// The right operand: words of all lanes, how far from one pair to the next, and to the next panel.
struct Right {
  const uint32_t* words;
  int64_t pair_step, panel_step;
};

template <int V>
inline void tile(const Left& left, const Right& right, int64_t count, const float* keep,
                 float* sums, int64_t step) {
  __m512 total[TILE][V];
  for (int r = 0; r < TILE; ++r)
    for (int v = 0; v < V; ++v)
      total[r][v] = keep == nullptr ? _mm512_setzero_ps()
                                    : _mm512_mul_ps(_mm512_loadu_ps(sums + r * step + v * LANES),
                                                    _mm512_set1_ps(keep[r]));
  const uint32_t* words = left.words;
  const uint32_t* lanes = right.words;
  for (int64_t pair = 0; pair < count; ++pair) {
    __m512bh wide[V];
    for (int v = 0; v < V; ++v) wide[v] = (__m512bh)_mm512_loadu_si512(lanes + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const auto one = (__m512bh)_mm512_set1_epi32(static_cast<int>(words[r * left.row_step]));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[r][v] = _mm512_dpbf16_ps(total[r][v], one, wide[v]);
    }
    words += left.pair_step;
    lanes += right.pair_step;
  }
  for (int r = 0; r < TILE; ++r)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * step + v * LANES, total[r][v]);
}

// sums [TILE][vectors of lanes] = keep[row] sums + left right over `count` pairs; without `keep`
// what was in `sums` is not read.
inline void multiply(const Left& left, Right right, int64_t count, int64_t vectors,
                     const float* keep, float* sums, int64_t step) {
  for (; vectors >= VECTORS; vectors -= VECTORS) {
    tile<4>(left, right, count, keep, sums, step);
    right.words += right.panel_step;
    sums += PANEL;
  }
  if (vectors == 3) tile<3>(left, right, count, keep, sums, step);
  if (vectors == 2) tile<2>(left, right, count, keep, sums, step);
  if (vectors == 1) tile<1>(left, right, count, keep, sums, step);
}

// 2^x: the polynomial with the least relative error between -1/2 and 1/2 (7.5e-8; 2.4e-7 with its
// own rounding), times a power of two. Far below zero it is zero.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 value = _mm512_set1_ps(0x1.5c08e6p-10f);
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(0x1.3d0c52p-7f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(0x1.c6b6e4p-5f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(0x1.ebf918p-3f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(0x1.62e428p-1f));
  value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(0x1.000002p+0f));
  return _mm512_scalef_ps(value, whole);
}

}  // namespace pairs
