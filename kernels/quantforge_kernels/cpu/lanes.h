// Sixteen rows side by side: the vector type of the packed kernels, in the compiler's own vector
// extension, so that one text becomes AVX-512, AVX2, NEON or plain code. Only what no compiler finds
// by itself is written per instruction set: the 8-bit dot product and the rounding to bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define QF_INLINE static inline __attribute__((always_inline))
#define QF_INLINE_MEMBER inline __attribute__((always_inline))

namespace quantforge {

constexpr int LANES = 16;

typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

template <typename Vector>
QF_INLINE Vector load(const void* address) {
  Vector value;
  std::memcpy(&value, address, sizeof(Vector));
  return value;
}

template <typename Vector>
QF_INLINE void store(void* address, Vector value) {
  std::memcpy(address, &value, sizeof(Vector));
}

QF_INLINE Words words_of(uint32_t value) { return Words{} + value; }
QF_INLINE Integers integers_of(int32_t value) { return Integers{} + value; }
QF_INLINE Floats floats_of(float value) { return Floats{} + value; }

QF_INLINE Floats to_floats(Integers value) { return __builtin_convertvector(value, Floats); }

// Zero-extension; some compilers make scalar code of the general conversion.
QF_INLINE Words extend(Halves value) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(__AVX2__)
  __m128i halves[2];
  std::memcpy(halves, &value, sizeof(halves));
  const __m256i parts[2] = {_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])};
  return load<Words>(parts);
#else
  return __builtin_convertvector(value, Words);
#endif
}

QF_INLINE Integers extend(Bytes value) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu8_epi32((__m128i)value);
#elif defined(__AVX2__)
  const __m128i bytes = (__m128i)value;
  const __m256i parts[2] = {_mm256_cvtepu8_epi32(bytes),
                            _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  return load<Integers>(parts);
#else
  return __builtin_convertvector(value, Integers);
#endif
}

// Sixteen bfloat16 as float32: their bits are the upper half.
QF_INLINE Floats widen(Halves value) { return (Floats)(extend(value) << 16); }

// Round to bfloat16, to nearest and ties to even. The machine instruction takes numbers below 2^-126
// as zero.
QF_INLINE Halves narrow(Floats value) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  Halves result;
  std::memcpy(&result, &rounded, sizeof(result));
  return result;
#else
  const Words bits = (Words)value;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
}

QF_INLINE Floats round_to_bfloat16(Floats value) { return widen(narrow(value)); }

// table[value mod 16] of every lane: one instruction where there is one.
QF_INLINE Floats look_up(Floats table, Words value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)value, (__m512)table);
#else
  Floats result;
  for (int lane = 0; lane < LANES; ++lane) result[lane] = table[value[lane] & 15];
  return result;
#endif
}

#if defined(__AVX512BF16__)
// Per lane, sum + first · a + second · b with (first, second) the two bfloat16 of the lane and (a, b)
// those of `pair`; the products are exact and the sums rounded to float32, as fused ones are.
QF_INLINE Floats dot_halves(Floats sum, Words both, uint32_t pair) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both,
                                  (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(pair)));
}

// table[value mod 32] of every half of a lane.
QF_INLINE Words look_up_halves(Words table, Words value) {
  return (Words)_mm512_permutexvar_epi16((__m512i)value, (__m512i)table);
}

// The same with both factors in float32, rounded to bfloat16 here.
QF_INLINE Floats dot_pair(Floats sum, Floats first, Floats second, uint32_t pair) {
  const __m512i order = (__m512i)Words{
      0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007,
      0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return dot_halves(sum, (Words)_mm512_permutexvar_epi16(order, (__m512i)both), pair);
}
#endif

QF_INLINE float widen_one(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

QF_INLINE uint16_t narrow_one(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// sum + Σ_j code_j · activation_j over the four bytes of each lane: codes unsigned, the four
// activations signed and the same for all lanes.
QF_INLINE Integers dot(Integers sum, Words codes, uint32_t activations) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes,
                                       _mm512_set1_epi32(static_cast<int32_t>(activations)));
#elif defined(__AVX2__)
  // The 8-bit multiply-add of AVX2 saturates; with 16-bit factors it is exact. Bytes 0 and 2 of a
  // lane are its even ones.
  const __m256i four = _mm256_set1_epi32(static_cast<int32_t>(activations));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
  const __m256i odd = _mm256_srai_epi16(four, 8);
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i parts[2], sums[2];
  std::memcpy(parts, &codes, sizeof(parts));
  std::memcpy(sums, &sum, sizeof(sums));
  for (int half = 0; half < 2; ++half) {
    const __m256i first = _mm256_madd_epi16(_mm256_and_si256(parts[half], low), even);
    const __m256i second = _mm256_madd_epi16(_mm256_srli_epi16(parts[half], 8), odd);
    sums[half] = _mm256_add_epi32(sums[half], _mm256_add_epi32(first, second));
  }
  std::memcpy(&sum, sums, sizeof(sums));
  return sum;
#else
  for (int byte = 0; byte < 4; ++byte) {
    const int32_t activation = static_cast<int8_t>(activations >> (8 * byte));
    sum += (Integers)((codes >> (8 * byte)) & 0xff) * activation;
  }
  return sum;
#endif
}

}  // namespace quantforge
