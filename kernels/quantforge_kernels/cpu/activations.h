// x made ready for the kernels: padded float32 rows, or 8-bit codes with a scale for every chunk.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemv.h"

namespace quantforge {

// Memory for one call, kept by the calling thread for the next.
struct Scratch {
  std::vector<float> values, scales;
  std::vector<uint16_t> halves;
  std::vector<int8_t> codes;
  std::vector<int32_t> code_sums;
};

// Units that share an activation scale: a group, or the largest even part of one that has at most
// 256 columns.
inline int64_t chunk_units(const Shape& shape) {
  const int64_t units = shape.units() / shape.groups;
  int64_t best = 1;
  for (int64_t count = 1; count <= 8; ++count)
    if (units % count == 0) best = count;
  return best;
}

// Columns 0 1 2 3 of every slot as 0 2 1 3, the pairs that the products take (see `Activations`).
inline void pair_columns(uint16_t* halves, int64_t columns) {
  for (int64_t column = 0; column < columns; column += 4) {
    uint64_t four;
    std::memcpy(&four, halves + column, sizeof(four));
    four = (four & 0xffff00000000ffffu) | (four & 0xffff0000u) << 16 | (four >> 16 & 0xffff0000u);
    std::memcpy(halves + column, &four, sizeof(four));
  }
}

inline void fill_values(const void* x, bool half, int64_t rows, const Shape& shape, Scratch& scratch,
                 Activations& result) {
  const int64_t stride = shape.units() * UNIT;
  scratch.values.resize(rows * stride);
  if (half) scratch.halves.resize(rows * stride);
  for (int64_t row = 0; row < rows; ++row) {
    float* values = scratch.values.data() + row * stride;
    if (half) {
      const uint16_t* source = static_cast<const uint16_t*>(x) + row * shape.columns;
      for (int64_t column = 0; column < shape.columns; ++column)
        values[column] = widen_one(source[column]);
      uint16_t* halves = scratch.halves.data() + row * stride;
      std::memcpy(halves, source, 2 * shape.columns);
      std::fill(halves + shape.columns, halves + stride, uint16_t{0});
      pair_columns(halves, stride);
    } else {
      std::memcpy(values, static_cast<const float*>(x) + row * shape.columns, 4 * shape.columns);
    }
    std::fill(values + shape.columns, values + stride, 0.0f);
  }
  result.stride = stride;
  result.values = scratch.values.data();
  result.halves = scratch.halves.data();
}

// q = round(x / t) with t = max|x| / 127 over `count` values; a multiple of sixteen of them is the
// fast case.
inline void quantize_chunk(const float* values, int64_t count, int8_t* codes, float* scale, int32_t* sum) {
  Floats largest = floats_of(0);
  int64_t index = 0;
  for (; index + LANES <= count; index += LANES) {
    const Floats value = load<Floats>(values + index);
    const Floats size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
  }
  float top = 0;
  for (int lane = 0; lane < LANES; ++lane) top = largest[lane] > top ? largest[lane] : top;
  for (int64_t rest = index; rest < count; ++rest) top = std::max(top, std::fabs(values[rest]));
  *scale = top / 127;
  const float inverse = top > 0 ? 127 / top : 0;
  // Adding and taking away 1.5 · 2^23 rounds to an integer, ties to even.
  const float magic = 12582912.0f;
  Integers total = integers_of(0);
  for (index = 0; index + LANES <= count; index += LANES) {
    const Floats shifted = load<Floats>(values + index) * inverse + magic;
    const Integers code = (Integers)shifted - 0x4b400000;
    total += code;
    typedef int8_t Codes __attribute__((vector_size(16)));
    store(codes + index, __builtin_convertvector(code, Codes));
  }
  int32_t whole = 0;
  for (int lane = 0; lane < LANES; ++lane) whole += total[lane];
  for (; index < count; ++index) {
    codes[index] = static_cast<int8_t>(std::nearbyint(values[index] * inverse));
    whole += codes[index];
  }
  *sum = whole;
}

inline void fill_codes(int64_t rows, const Shape& shape, Scratch& scratch, Activations& result) {
  const int64_t stride = result.stride;
  int64_t width = shape.width();
  result.chunks = shape.groups;
  result.chunk_units = 0;
  if (shape.aligned()) {
    result.chunk_units = chunk_units(shape);
    width = result.chunk_units * UNIT;
    result.chunks = shape.units() / result.chunk_units;
  }
  scratch.codes.resize(rows * stride);
  scratch.scales.resize(rows * result.chunks);
  scratch.code_sums.resize(rows * result.chunks);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t chunk = 0; chunk < result.chunks; ++chunk) {
      const int64_t index = row * result.chunks + chunk, start = row * stride + chunk * width;
      quantize_chunk(result.values + start, width, scratch.codes.data() + start,
                     &scratch.scales[index], &scratch.code_sums[index]);
    }
  result.codes = scratch.codes.data();
  result.scales = scratch.scales.data();
  result.code_sums = scratch.code_sums.data();
}

inline Activations prepare_activations(const void* x, bool half, int64_t rows, const Shape& shape,
                                Mode mode, Scratch& scratch) {
  Activations result{};
  fill_values(x, half, rows, shape, scratch, result);
  if (mode == Mode::QUANTIZED) fill_codes(rows, shape, scratch, result);
  return result;
}

}  // namespace quantforge
