// Depthwise convolution: channels are lanes, and the four bytes of a lane are rows of the kernel.
//
// Sixty-four channels at a time, as four vectors: lane l of vector v is channel
// 16 (l / 4) + 4 v + l % 4, the order in which interleaving bytes within 128 bits leaves them. For a
// row of outputs the input rows of the kernel are interleaved once, column by column; a product with
// one column of the kernel is then one 8-bit dot product a vector. A kernel whose rows leave bytes of
// its lanes free (5 rows take 8) is moved down in them for the rows of outputs below, so that several
// share what is interleaved.
#pragma once

#include "implicit.h"

namespace quantforge {

constexpr int64_t BLOCK = 64;  // channels
constexpr int VECTORS = 4;

struct Depthwise {
  int64_t kernel_height, kernel_width, dilation_down, dilation_across;

  int64_t row_groups() const { return (kernel_height + 3) / 4; }
  int64_t slots() const { return kernel_width * row_groups() * VECTORS; }
  // Rows of outputs that find their input rows in the same lanes.
  int64_t shared_rows(int64_t stride_down) const {
    if (dilation_down > 1) return 1;
    return (4 * row_groups() - kernel_height) / stride_down + 1;
  }
};

// The kernel's rows `bytes` further down in their lanes; the rows it is moved over are zero.
inline void move_down(const Depthwise& kernel, const Words* weights, int64_t bytes, Words* moved) {
  const int64_t groups = kernel.row_groups(), whole = bytes / 4, bits = 8 * (bytes % 4);
  for (int64_t tap = 0; tap < kernel.kernel_width; ++tap)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t v = 0; v < VECTORS; ++v) {
        const int64_t at = (tap * groups + group) * VECTORS + v, from = at - whole * VECTORS;
        Words value = words_of(0);
        if (group >= whole) value = weights[from] << bits;
        if (bits > 0 && group > whole) value |= weights[from - VECTORS] >> (32 - bits);
        moved[at] = value;
      }
}

inline int64_t block_channel(int64_t vector, int64_t lane) {
  return 16 * (lane / 4) + 4 * vector + lane % 4;
}

// Four rows' bytes of up to 64 channels; a null row is padding, and past the kernel.
QF_INLINE void interleave(const uint8_t* const (&rows)[4], int64_t count, uint8_t zero,
                          Words* target) {
#if defined(__AVX512BW__)
  const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  __m512i row[4];
  for (int j = 0; j < 4; ++j)
    row[j] = rows[j] ? _mm512_maskz_loadu_epi8(mask, rows[j]) : _mm512_set1_epi8(zero);
  const __m512i first = _mm512_unpacklo_epi8(row[0], row[1]);
  const __m512i second = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i third = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i fourth = _mm512_unpackhi_epi8(row[2], row[3]);
  target[0] = (Words)_mm512_unpacklo_epi16(first, third);
  target[1] = (Words)_mm512_unpackhi_epi16(first, third);
  target[2] = (Words)_mm512_unpacklo_epi16(second, fourth);
  target[3] = (Words)_mm512_unpackhi_epi16(second, fourth);
#else
  for (int vector = 0; vector < VECTORS; ++vector)
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t channel = block_channel(vector, lane);
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) {
        const uint32_t byte = rows[j] && channel < count ? rows[j][channel] : zero;
        word |= byte << (8 * j);
      }
      target[vector][lane] = word;
    }
#endif
}

// The codes of a block, back in the order of the channels.
QF_INLINE void store_block(uint8_t* target, const Integers (&codes)[VECTORS], int64_t count) {
#if defined(__AVX512BW__)
  const __m512i low = _mm512_packs_epi32((__m512i)codes[0], (__m512i)codes[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)codes[2], (__m512i)codes[3]);
  const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  _mm512_mask_storeu_epi8(target, mask, _mm512_packus_epi16(low, high));
#else
  for (int vector = 0; vector < VECTORS; ++vector)
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t channel = block_channel(vector, lane);
      if (channel < count) target[channel] = static_cast<uint8_t>(codes[vector][lane]);
    }
#endif
}

template <Result RESULT>
QF_INLINE void write_block(const Integers (&sums)[VECTORS], const float* scales, const Epilogue& to,
                           int64_t block, int64_t position, int64_t count) {
  const int64_t index = block * BLOCK, at = position * to.stride + block * BLOCK;
  Integers codes[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t lane = index + v * LANES;
    if constexpr (RESULT == Result::DYADIC) {
      const Integers code = dyadic(sums[v], to, lane);
      codes[v] = clamped(code, to.least - to.zero, to.most - to.zero) + to.zero;
    } else {
      const Floats value =
          to_floats(sums[v]) * load<Floats>(scales + lane) + load<Floats>(to.bias + lane);
      if constexpr (RESULT == Result::CODES) {
        codes[v] = codes_of(value, to);
      } else {
        const Floats inside = clamped(value, to.low, to.high);
        for (int64_t l = 0; l < LANES; ++l) {
          const int64_t channel = block_channel(v, l);
          if (channel < count) static_cast<float*>(to.out)[at + channel] = inside[l];
        }
      }
    }
  }
  if constexpr (RESULT != Result::FLOATS)
    store_block(static_cast<uint8_t*>(to.out) + at, codes, count);
}

// The outputs of one row and one block; `columns` holds [input column, row group, 4] words.
template <Result RESULT, int WIDTH, int GROUPS>
void block_row(const Places& places, const Depthwise& kernel, const Words* weights,
               const Words* columns, const int32_t* offsets, const float* scales,
               const Epilogue& to, int64_t block, int64_t first, int64_t count) {
  const int64_t width = WIDTH ? WIDTH : kernel.kernel_width;
  const int64_t groups = GROUPS ? GROUPS : kernel.row_groups(), a_column = groups * VECTORS;
  Integers start[VECTORS];
  for (int v = 0; v < VECTORS; ++v)
    start[v] = load<Integers>(offsets + block * BLOCK + v * LANES) * -places.zero;
  for (int64_t x = 0; x < places.out_width; ++x) {
    const Words* column = columns + x * places.stride_across * a_column;
    Integers sums[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sums[v] = start[v];
#pragma GCC unroll 8
    for (int64_t tap = 0; tap < width; ++tap) {
      const Words* from = column + tap * kernel.dilation_across * a_column;
      const Words* weight = weights + tap * a_column;
#pragma GCC unroll 2
      for (int64_t group = 0; group < groups; ++group)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          sums[v] = dot_codes(sums[v], from[group * VECTORS + v], weight[group * VECTORS + v]);
    }
    write_block<RESULT>(sums, scales, to, block, first + x, count);
  }
}

template <Result RESULT>
void any_row(const Places& places, const Depthwise& kernel, const Words* weights,
             const Words* columns, const int32_t* offsets, const float* scales, const Epilogue& to,
             int64_t block, int64_t first, int64_t count) {
  if (kernel.kernel_width == 3 && kernel.row_groups() == 1) {
    block_row<RESULT, 3, 1>(places, kernel, weights, columns, offsets, scales, to, block,
                            first, count);
  } else if (kernel.kernel_width == 5 && kernel.row_groups() == 2) {
    block_row<RESULT, 5, 2>(places, kernel, weights, columns, offsets, scales, to, block,
                            first, count);
  } else {
    block_row<RESULT, 0, 0>(places, kernel, weights, columns, offsets, scales, to, block,
                            first, count);
  }
}

// `count_rows` rows of outputs of one block of channels, from `down` on; `weights` has the kernel for
// each of them.
inline void depthwise_rows(const Places& places, const Depthwise& kernel, const uint8_t* x,
                           const IntegerWeight& weight, const Words* weights, const Epilogue& to,
                           int64_t picture, int64_t down, int64_t count_rows, int64_t block,
                           Words* columns) {
  const int64_t rows_read = kernel.kernel_height + (count_rows - 1) * places.stride_down;
  const int64_t count = std::min<int64_t>(BLOCK, places.channels - block * BLOCK);
  const uint8_t* image = x + picture * places.height * places.width * places.channels;
  const int64_t top = down * places.stride_down - places.padding_down;
  const int64_t groups = kernel.row_groups();
  const int64_t reach = (kernel.kernel_width - 1) * kernel.dilation_across + 1;
  const int64_t needed = (places.out_width - 1) * places.stride_across + reach;
  const uint8_t zero = static_cast<uint8_t>(places.zero);
  for (int64_t index = 0; index < needed; ++index) {
    const int64_t column = index - places.padding_across;
    const bool outside = column < 0 || column >= places.width;
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* rows[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t tap = 4 * group + j, y = top + tap * kernel.dilation_down;
        const bool none = outside || tap >= rows_read || y < 0 || y >= places.height;
        rows[j] = none ? nullptr
                       : image + (y * places.width + column) * places.channels + block * BLOCK;
      }
      interleave(rows, count, zero, columns + (index * groups + group) * VECTORS);
    }
  }
  const int32_t* offsets = weight.sums;
  for (int64_t row = 0; row < count_rows; ++row, weights += kernel.slots()) {
    const int64_t first = (picture * places.out_height + down + row) * places.out_width;
    switch (to.result) {
      case Result::FLOATS:
        any_row<Result::FLOATS>(places, kernel, weights, columns, offsets, weight.scales, to, block,
                                first, count);
        break;
      case Result::CODES:
        any_row<Result::CODES>(places, kernel, weights, columns, offsets, weight.scales, to, block,
                               first, count);
        break;
      case Result::DYADIC:
        any_row<Result::DYADIC>(places, kernel, weights, columns, offsets, weight.scales, to, block,
                                first, count);
        break;
    }
  }
}

}  // namespace quantforge
