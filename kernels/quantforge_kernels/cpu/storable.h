// Rounding to the values that 16 bits can store: grids are searched among those.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Nearest bfloat16, ties to even.
inline float round_to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word += 0x7fffu + ((word >> 16) & 1u);
  word &= 0xffff0000u;
  std::memcpy(&value, &word, 4);
  return value;
}

// Nearest float16, ties to even, for magnitudes below 65504.
inline float round_to_float16(float value) {
  constexpr float SMALLEST_NORMAL = 1.0f / 16384.0f, SUBNORMALS = 16777216.0f;
  if (std::fabs(value) < SMALLEST_NORMAL) return __builtin_rintf(value * SUBNORMALS) / SUBNORMALS;
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word += 0x0fffu + ((word >> 13) & 1u);
  word &= 0xffffe000u;
  std::memcpy(&value, &word, 4);
  return value;
}
