// Products of unsigned activation codes with signed weights, and how weights are laid out for them.
//
// A weight is a sequence of slots: four columns of sixteen output channels, a byte each, which is
// what an 8-bit dot product takes. Eight slots are a unit of packed.h, so that a weight stays in
// memory at the bits of its codes; a panel of one to four tiles becomes signed bytes where it is used.
#pragma once

#include <algorithm>
#include <vector>

#include "packed.h"

namespace quantforge {

typedef int64_t Longs __attribute__((vector_size(64)));
typedef uint8_t Quads __attribute__((vector_size(64)));  // four bytes of sixteen lanes

// Memory of the calling thread that grows and is kept for the next call.
template <typename T>
struct Space {
  std::vector<T> held;
  T* start(int64_t count) {
    constexpr int64_t ALIGNMENT = 64;
    const size_t extra = ALIGNMENT / sizeof(T) + 1;
    if (held.size() < static_cast<size_t>(count) + extra) held.resize(count + extra);
    const auto address = reinterpret_cast<uintptr_t>(held.data());
    return reinterpret_cast<T*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  }
};

// sum + Σ_j activation_j · weight_j over the four bytes of each lane: activations unsigned,
// weights signed. Exact on every instruction set.
QF_INLINE Integers dot_codes(Integers sum, Words activations, Words weights) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)activations, (__m512i)weights);
#elif defined(__AVX2__)
  // Sixteen-bit factors: the multiply-add of bytes saturates.
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i left[2], right[2], sums[2];
  std::memcpy(left, &activations, sizeof(left));
  std::memcpy(right, &weights, sizeof(right));
  std::memcpy(sums, &sum, sizeof(sums));
  for (int half = 0; half < 2; ++half) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(right[half], 8), 8);
    const __m256i first = _mm256_madd_epi16(_mm256_and_si256(left[half], low), even);
    const __m256i second = _mm256_madd_epi16(_mm256_srli_epi16(left[half], 8),
                                             _mm256_srai_epi16(right[half], 8));
    sums[half] = _mm256_add_epi32(sums[half], _mm256_add_epi32(first, second));
  }
  std::memcpy(&sum, sums, sizeof(sums));
  return sum;
#else
  for (int byte = 0; byte < 4; ++byte) {
    const Integers weight = (Integers)(weights << (24 - 8 * byte)) >> 24;
    sum += (Integers)((activations >> (8 * byte)) & 0xff) * weight;
  }
  return sum;
#endif
}

// What a layer's weight is, prepared: see integer_convolution.py for how it is made.
struct IntegerWeight {
  int64_t units, groups, group_slots;  // of a tile; scale groups of a row; slots of a group
  int bits;
  const uint32_t* codes;   // [tile, units, bits, 16]
  const uint8_t* zeros;    // [tile, groups, 64], or null: 2^(bits - 1)
  const int32_t* sums;     // [tile, groups, 16]: of the decoded weights
  const int32_t* shifts;   // [tile, groups, 16] to add to every weight, or null
  const float* scales;     // [tile, groups, 16]
};

// One tile of the weight as signed bytes: slot s goes to target[s · step].
template <int BITS>
QF_INLINE void decode_tile(const IntegerWeight& weight, int64_t tile, Words* target, int64_t step) {
  const uint32_t* source = weight.codes + tile * weight.units * BITS * LANES;
  const Quads middle = Quads{} + static_cast<uint8_t>(1 << (BITS - 1));
  const uint8_t* zeros = weight.zeros ? weight.zeros + tile * weight.groups * 64 : nullptr;
  Words slots[SLOTS];
  for (int64_t unit = 0; unit < weight.units; ++unit, source += BITS * LANES) {
    decode_unit<BITS>(source, slots);
    Words* to = target + unit * SLOTS * step;
#pragma GCC unroll 8
    for (int slot = 0; slot < SLOTS; ++slot) {
      Quads zero = middle;
      if (zeros) {
        const int64_t group = (unit * SLOTS + slot) / weight.group_slots;
        zero = load<Quads>(zeros + 64 * std::min(group, weight.groups - 1));
      }
      to[slot * step] = (Words)((Quads)slots[slot] - zero);
    }
  }
}

inline void decode_any(const IntegerWeight& weight, int64_t tile, Words* target, int64_t step) {
  QF_WITH_WIDTH(weight.bits, decode_tile<BITS>(weight, tile, target, step));
}

// Rows of activations: position m starts at data + m · stride.
struct Rows {
  const uint8_t* data;
  int64_t stride;

  uint32_t four(int64_t row, int64_t slot) const {
    uint32_t value;
    std::memcpy(&value, data + row * stride + 4 * slot, sizeof(value));
    return value;
  }
};

// sums[m][v] += products of slots [first, last) of M rows with a panel of NV tiles; `ones` sums of
// the activations themselves where COUNT.
template <int NV, int M, bool COUNT>
QF_INLINE void multiply_slots(const Rows& rows, const Words* panel, int64_t first, int64_t last,
                              Integers (&sums)[M][NV], Integers (&counts)[M]) {
  const Words ones = words_of(0x01010101u);
  for (int64_t slot = first; slot < last; ++slot) {
    Words weights[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weights[v] = panel[slot * NV + v];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Words four = words_of(rows.four(m, slot));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[m][v] = dot_codes(sums[m][v], four, weights[v]);
      if (COUNT) counts[m] = dot_codes(counts[m], four, ones);
    }
  }
}

}  // namespace quantforge
