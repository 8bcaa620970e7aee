// What becomes of sums of integers: float numbers, codes through a float scale, or codes through
// integers alone (HAWQ-V3: the scale is a multiplier of 31 bits over a power of two).
#pragma once

#include "codes.h"

namespace quantforge {

enum class Result { FLOATS = 0, CODES = 1, DYADIC = 2 };

// Per layer; arrays by tile and lane.
struct Epilogue {
  Result result;
  const float* bias;           // FLOATS and CODES
  float inverse;               // CODES: 1 / scale of the output's grid
  const int32_t* offsets;      // DYADIC: bias in units of the sums
  const int32_t* multipliers;  // DYADIC
  const int32_t* shifts;       // DYADIC, 1..62
  float low, high;             // FLOATS: clamp
  int32_t zero, least, most;   // CODES and DYADIC: zero of the grid, clamp of the code
  void* out;
  int64_t stride;              // elements from one position to the next
};

// floor(value + 1/2) for value = (sum + offset) · multiplier / 2^shift
QF_INLINE int32_t dyadic_one(int64_t sum, int32_t multiplier, int32_t shift) {
  return static_cast<int32_t>((sum * multiplier + (int64_t{1} << (shift - 1))) >> shift);
}

QF_INLINE Integers dyadic(Integers sum, const Epilogue& to, int64_t index) {
#if defined(__AVX512F__)
  const __m512i offset = _mm512_loadu_si512(to.offsets + index);
  const __m512i multiplier = _mm512_loadu_si512(to.multipliers + index);
  const __m512i shift = _mm512_loadu_si512(to.shifts + index);
  const __m512i value = _mm512_add_epi32((__m512i)sum, offset), one = _mm512_set1_epi64(1);
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  __m512i parts[2];
  for (int odd = 0; odd < 2; ++odd) {
    const int move = 32 * odd;
    const __m512i count = odd ? _mm512_srli_epi64(shift, 32) : _mm512_and_si512(shift, low);
    const __m512i half = _mm512_sllv_epi64(one, _mm512_sub_epi64(count, one));
    const __m512i product = _mm512_mul_epi32(_mm512_srli_epi64(value, move),
                                             _mm512_srli_epi64(multiplier, move));
    parts[odd] = _mm512_srav_epi64(_mm512_add_epi64(product, half), count);
  }
  return (Integers)_mm512_mask_blend_epi32(0xaaaa, parts[0], _mm512_slli_epi64(parts[1], 32));
#else
  for (int lane = 0; lane < LANES; ++lane)
    sum[lane] = dyadic_one(static_cast<int64_t>(sum[lane]) + to.offsets[index + lane],
                           to.multipliers[index + lane], to.shifts[index + lane]);
  return sum;
#endif
}

QF_INLINE Floats clamped(Floats value, float low, float high) {
  value = value < low ? floats_of(low) : value;
  return value > high ? floats_of(high) : value;
}

QF_INLINE Integers clamped(Integers value, int32_t low, int32_t high) {
  value = value < low ? integers_of(low) : value;
  return value > high ? integers_of(high) : value;
}

// The nearest integer, ties to even, of |value| < 2^22, and `added` to it.
QF_INLINE Integers nearest(Floats value, int32_t added = 0) {
  return (Integers)(value + 12582912.0f) + (added - 0x4b400000);
}

// Codes of float numbers on the output's grid.
QF_INLINE Integers codes_of(Floats value, const Epilogue& to) {
  const float low = static_cast<float>(to.least - to.zero);
  const float high = static_cast<float>(to.most - to.zero);
  return nearest(clamped(value * to.inverse, low, high), to.zero);
}

QF_INLINE void store_bytes(uint8_t* target, Integers codes, int64_t count) {
  const Bytes bytes = __builtin_convertvector(codes, Bytes);
  if (count >= LANES) {
    store(target, bytes);
  } else {
    std::memcpy(target, &bytes, count);
  }
}

// Codes of up to four tiles of channels that lie together.
template <int NV>
QF_INLINE void store_tiles(uint8_t* target, const Integers (&codes)[NV], int64_t count) {
#if defined(__AVX512BW__)
  __m512i tiles[4] = {};
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) tiles[v] = (__m512i)codes[v];
  const __m512i low = _mm512_packs_epi32(tiles[0], tiles[1]);
  const __m512i high = _mm512_packs_epi32(tiles[2], tiles[3]);
  // Packing within 128 bits leaves four channels of every tile side by side.
  const __m512i order = (__m512i)Words{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
  const int64_t kept = count < NV * LANES ? count : NV * LANES;
  _mm512_mask_storeu_epi8(target, kept >= 64 ? ~__mmask64{0} : (__mmask64{1} << kept) - 1, bytes);
#else
  for (int v = 0; v < NV; ++v) store_bytes(target + v * LANES, codes[v], count - v * LANES);
#endif
}

}  // namespace quantforge
