// Products of a few rows with a packed matrix, a tile of sixteen outputs at a time.
//
// Every function adds, for each of its M rows of x, the products with sixteen rows of the weight. The
// lanes are outputs, so nothing is summed across lanes and an activation is a broadcast. Three
// ways to multiply:
//
//   exact, float32     Σ_g s_g Σ_c (code_c − zero_g) x_c, all in float32
//   exact, bfloat16    Σ_c bf16((code_c − zero_g) s_g) x_c, summed in float32
//   8-bit activations  Σ_k s_g t_k (Σ_c code_c q_c − zero_g Σ_c q_c), the inner sums in int32, where
//                      x_c ≈ t_k q_c inside chunk k of a group
//
// so a scale costs one multiplication a group, except where design asks for its rounding.
#pragma once

#include "packed.h"

namespace quantforge {

// x as the kernels want it: float32 rows padded with zeros to whole units, or int8 rows with the scale
// and the sum of each chunk.
struct Activations {
  int64_t stride;       // columns of a padded row
  int64_t chunk_units;  // units that share an activation scale
  int64_t chunks;       // of a row
  const float* values;
  const int8_t* codes;
  const float* scales;
  const int32_t* code_sums;
};

template <int M>
constexpr int CHAINS = M == 1 ? 4 : 2;  // independent sums, so that additions need not wait

QF_INLINE Integers byte_of(Words slot, int byte) {
  const Words moved = byte == 0 ? slot : slot >> (8 * byte);
  return (Integers)(byte == 3 ? moved : (moved & 0xff));
}

template <int BITS, int M, bool ROUND>
void exact_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row, Floats* out) {
  const Shape& shape = weight.shape;
  const int64_t units = shape.units() / shape.groups;
  const uint32_t* source = weight.codes(tile);
  const float* values = x.values + row * x.stride;
  for (int m = 0; m < M; ++m) out[m] = floats_of(0);
  for (int64_t group = 0; group < shape.groups; ++group) {
    Floats scale = weight.scale(tile, group);
    if (ROUND && shape.wide_scales) scale = round_to_bfloat16(scale);
    const Floats zero = to_floats(weight.zero(tile, group));
    const Floats offset = -(zero * scale);
    Floats sum[M][CHAINS<M>];
    for (int m = 0; m < M; ++m)
      for (int chain = 0; chain < CHAINS<M>; ++chain) sum[m][chain] = floats_of(0);
    for (int64_t unit = 0; unit < units; ++unit) {
      Words slots[SLOTS];
      decode_unit<BITS>(source, slots);
      source += BITS * LANES;
#pragma GCC unroll 8
      for (int slot = 0; slot < SLOTS; ++slot) {
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
          Floats code = to_floats(byte_of(slots[slot], byte));
          code = ROUND ? round_to_bfloat16(code * scale + offset) : code - zero;
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            sum[m][byte % CHAINS<M>] += code * values[m * x.stride + 4 * slot + byte];
          }
        }
      }
      values += UNIT;
    }
    for (int m = 0; m < M; ++m) {
      Floats total = sum[m][0];
      for (int chain = 1; chain < CHAINS<M>; ++chain) total += sum[m][chain];
      out[m] += ROUND ? total : scale * total;
    }
  }
}

template <int BITS, int M>
void quantized_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row,
                    Floats* out) {
  const Shape& shape = weight.shape;
  const int64_t chunks = x.chunks / shape.groups;
  const uint32_t* source = weight.codes(tile);
  const int8_t* codes = x.codes + row * x.stride;
  for (int m = 0; m < M; ++m) out[m] = floats_of(0);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const Floats scale = weight.scale(tile, group);
    const Integers zero = weight.zero(tile, group);
    for (int64_t chunk = group * chunks; chunk < (group + 1) * chunks; ++chunk) {
      Integers sum[M][CHAINS<M>];
      for (int m = 0; m < M; ++m)
        for (int chain = 0; chain < CHAINS<M>; ++chain) sum[m][chain] = integers_of(0);
      for (int64_t unit = 0; unit < x.chunk_units; ++unit) {
        Words slots[SLOTS];
        decode_unit<BITS>(source, slots);
        source += BITS * LANES;
#pragma GCC unroll 8
        for (int slot = 0; slot < SLOTS; ++slot) {
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            uint32_t four;
            std::memcpy(&four, codes + m * x.stride + 4 * slot, sizeof(four));
            Integers& chain = sum[m][slot % CHAINS<M>];
            chain = dot(chain, slots[slot], four);
          }
        }
        codes += UNIT;
      }
      for (int m = 0; m < M; ++m) {
        Integers total = sum[m][0];
        for (int chain = 1; chain < CHAINS<M>; ++chain) total += sum[m][chain];
        const int64_t index = (row + m) * x.chunks + chunk;
        out[m] += to_floats(total - zero * x.code_sums[index]) * (scale * x.scales[index]);
      }
    }
  }
}

// Any grouping, one row of x: every column asks which group it is in. `quantized` takes the 8-bit
// activations, whose chunks are the groups then.
template <bool ROUND>
void any_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row, bool quantized,
              Floats* out) {
  const Shape& shape = weight.shape;
  const int64_t width = shape.width();
  const uint32_t* source = weight.codes(tile);
  Floats total = floats_of(0), sum = floats_of(0);
  Integers integer_sum = integers_of(0);
  Words slots[SLOTS];
  for (int64_t column = 0; column < shape.columns; ++column) {
    const int64_t inside = column % UNIT;
    if (inside == 0) {
      QF_WITH_WIDTH(shape.bits, decode_unit<BITS>(source, slots));
      source += shape.bits * LANES;
    }
    const int64_t group = column / width;
    const Integers code =
        (Integers)((slots[inside / 4] >> static_cast<int>(8 * (inside % 4))) & 0xff);
    const Integers difference = code - weight.zero(tile, group);
    if (quantized) {
      integer_sum += difference * static_cast<int32_t>(x.codes[row * x.stride + column]);
    } else if (ROUND) {
      Floats scale = weight.scale(tile, group);
      if (shape.wide_scales) scale = round_to_bfloat16(scale);
      total += round_to_bfloat16(to_floats(difference) * scale) * x.values[row * x.stride + column];
    } else {
      sum += to_floats(difference) * x.values[row * x.stride + column];
    }
    if ((column + 1) % width == 0) {
      const Floats scale = weight.scale(tile, group);
      if (quantized) {
        total += to_floats(integer_sum) * (scale * x.scales[row * x.chunks + group]);
      } else {
        total += sum * scale;
      }
      sum = floats_of(0);
      integer_sum = integers_of(0);
    }
  }
  out[0] = total;
}

enum class Mode { FLOAT = 0, ROUNDED = 1, QUANTIZED = 2 };

template <int BITS, int M>
void some_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row, Mode mode,
               Floats* out) {
  if (mode == Mode::QUANTIZED) {
    quantized_tile<BITS, M>(weight, tile, x, row, out);
  } else if (mode == Mode::ROUNDED) {
    exact_tile<BITS, M, true>(weight, tile, x, row, out);
  } else {
    exact_tile<BITS, M, false>(weight, tile, x, row, out);
  }
}

// Sixteen outputs of `count` rows of x (at most 4), into `out`.
inline void tile_product(const Weight& weight, int64_t tile, const Activations& x, int64_t row,
                         int64_t count, Mode mode, Floats* out) {
  if (!weight.shape.aligned()) {
    for (int64_t m = 0; m < count; ++m) {
      if (mode == Mode::ROUNDED) {
        any_tile<true>(weight, tile, x, row + m, false, out + m);
      } else {
        any_tile<false>(weight, tile, x, row + m, mode == Mode::QUANTIZED, out + m);
      }
    }
    return;
  }
  int64_t done = 0;
  for (; count - done >= 4; done += 4) {
    QF_WITH_WIDTH(weight.shape.bits,
                  (some_tile<BITS, 4>(weight, tile, x, row + done, mode, out + done)));
  }
  for (; done < count; ++done) {
    QF_WITH_WIDTH(weight.shape.bits,
                  (some_tile<BITS, 1>(weight, tile, x, row + done, mode, out + done)));
  }
}

}  // namespace quantforge
