// Products of a few rows with a packed matrix, a tile of sixteen outputs at a time.
//
// Every function adds, for each of its M rows of x, the products with sixteen rows of the weight. The
// lanes are outputs, so nothing is summed across lanes and an activation is a broadcast. Three
// ways to multiply:
//
//   exact, float32     Σ_g s_g Σ_c (code_c − zero_g) x_c, all in float32
//   exact, bfloat16    Σ_c bf16((code_c − zero_g) s_g) x_c, summed in float32; with AVX-512 BF16 two
//                      columns an instruction, which takes numbers below 2^-126 as zero. At 2 and 3
//                      bits without zero-points the rounding is taken out of the sum (`counted_tile`)
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
  // The same in bfloat16, for the products that round weights to it; the columns of a slot in the
  // order 0 2 1 3, since the halves of a lane hold a slot's bytes 0 and 2, and shifted 1 and 3.
  const uint16_t* halves;
  const int8_t* codes;
  const float* scales;
  const int32_t* code_sums;
};

#if defined(__AVX512F__)
constexpr bool HAS_LOOK_UP = true;
#else
constexpr bool HAS_LOOK_UP = false;
#endif

template <int M>
constexpr int CHAINS = M == 1 ? 4 : 2;  // independent sums, so that additions need not wait

// Ask for the cache lines that come a page later: the tiles of a thread follow one another. Measured
// on one core of Zen 5: the 8-bit products read 5 to 15 % faster with 4096 than with 1024 or 2048.
template <int BITS>
QF_INLINE void fetch_ahead(const uint32_t* source) {
  constexpr int AHEAD = 4096;
#pragma GCC unroll 8
  for (int vector = 0; vector < BITS; ++vector)
    __builtin_prefetch(reinterpret_cast<const uint8_t*>(source) + AHEAD + 64 * vector);
}

QF_INLINE Integers byte_of(Words slot, int byte) {
  const Words moved = byte == 0 ? slot : slot >> (8 * byte);
  return (Integers)(byte == 3 ? moved : (moved & 0xff));
}

// How a byte of a slot becomes code − zero in float32. Up to four bits and with the constant zero it
// is looked up by its low four bits, which needs no mask: what is above the code is zero in a slot.
template <int BITS, bool CONSTANT_ZERO>
struct Difference {
  Floats zero;

  QF_INLINE_MEMBER explicit Difference(Integers zeros) {
    if constexpr (BITS <= 4 && CONSTANT_ZERO && HAS_LOOK_UP) {
      for (int code = 0; code < LANES; ++code) zero[code] = code - (1 << (BITS - 1));
    } else {
      zero = to_floats(zeros);
    }
  }
  QF_INLINE_MEMBER Floats operator()(Words slot, int byte) const {
    if constexpr (BITS <= 4 && CONSTANT_ZERO && HAS_LOOK_UP) {
      return look_up(zero, byte == 0 ? slot : slot >> (8 * byte));
    } else {
      return to_floats(byte_of(slot, byte)) - zero;
    }
  }
};

// Bytes `byte` and `byte + 2` of a slot's columns, byte 0 or 1, as two bfloat16.
QF_INLINE uint32_t pair_at(const uint16_t* halves, int slot, int byte) {
  uint32_t pair;
  std::memcpy(&pair, halves + 4 * slot + 2 * byte, sizeof(pair));
  return pair;
}

template <int BITS, int M, bool ROUND, bool CONSTANT_ZERO>
void exact_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row, Floats* out) {
  const Shape& shape = weight.shape;
  const int64_t units = shape.units() / shape.groups;
  const uint32_t* source = weight.codes(tile);
  const float* values = x.values + row * x.stride;
  const uint16_t* halves = x.halves + row * x.stride;
  for (int m = 0; m < M; ++m) out[m] = floats_of(0);
  for (int64_t group = 0; group < shape.groups; ++group) {
    Floats scale = weight.scale(tile, group);
    if (ROUND && shape.wide_scales) scale = round_to_bfloat16(scale);
    const Difference<BITS, CONSTANT_ZERO> difference(weight.zero(tile, group));
    Floats sum[M][CHAINS<M>];
    for (int m = 0; m < M; ++m)
      for (int chain = 0; chain < CHAINS<M>; ++chain) sum[m][chain] = floats_of(0);
    for (int64_t unit = 0; unit < units; ++unit) {
      Words slots[SLOTS];
      fetch_ahead<BITS>(source);
      decode_unit<BITS>(source, slots);
      source += BITS * LANES;
#pragma GCC unroll 8
      for (int slot = 0; slot < SLOTS; ++slot) {
#if defined(__AVX512BF16__)
        if constexpr (ROUND) {
#pragma GCC unroll 2
          for (int byte = 0; byte < 2; ++byte) {
            const Floats first = difference(slots[slot], byte) * scale;
            const Floats second = difference(slots[slot], byte + 2) * scale;
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
              Floats& chain = sum[m][(2 * slot + byte) % CHAINS<M>];
              chain = dot_pair(chain, first, second, pair_at(halves + m * x.stride, slot, byte));
            }
          }
          continue;
        }
#endif
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
          Floats code = difference(slots[slot], byte);
          if constexpr (ROUND) code = round_to_bfloat16(code * scale);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            sum[m][byte % CHAINS<M>] += code * values[m * x.stride + 4 * slot + byte];
          }
        }
      }
      values += UNIT;
      halves += UNIT;
    }
    for (int m = 0; m < M; ++m) {
      Floats total = sum[m][0];
      for (int chain = 1; chain < CHAINS<M>; ++chain) total += sum[m][chain];
      out[m] += ROUND ? total : scale * total;
    }
  }
}

#if defined(__AVX512BF16__)
// What every code counts in a sum, as bfloat16 by its low five bits: code − zero, and what of it the
// rounding of its product with the scale is about.
template <int BITS>
struct Counts {
  uint16_t difference[32], three[32];

  constexpr Counts() : difference{}, three{} {
    constexpr uint16_t FROM_MINUS_FOUR[] = {0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040};
    for (int entry = 0; entry < 32; ++entry) {
      const int value = entry % (1 << BITS) - (1 << (BITS - 1));
      difference[entry] = FROM_MINUS_FOUR[value + 4];
      three[entry] = value == 3 ? 0x3f80 : value == -3 ? 0xbf80 : 0;
    }
  }
};

// Slot s of a unit with its code in the low bits of every byte, and anything above them.
template <int BITS>
QF_INLINE Words open_slot(const uint32_t* source, int slot) {
  const int part = slot % 4;
  const Words low = load<Words>(source + slot / 4 * LANES) >> (2 * part);
  if constexpr (BITS == 2) return low;
  const Words plane = load<Words>(source + 2 * LANES);
  const Words high = slot < 2 ? plane << (2 - slot) : plane >> (slot - 2);
  return (low & 0x03030303u) | (high & 0xfcfcfcfcu);
}

// The rounded products at 2 and 3 bits without zero-points, where code − zero is one of −4 … 3. All
// of these but 3 and −3 times a bfloat16 scale s are bfloat16 as they are, so that
//
//   Σ_c bf16((code_c − zero) s) x_c = s Σ_c (code_c − zero) x_c + (bf16(3 s) − 3 s) Σ_c t_c x_c
//
// with t = 1 where code − zero is 3, −1 where it is −3, else 0. Both sums are of small integers,
// which are looked up two columns at a time: a weight costs no product and no rounding of its own.
template <int BITS, int M>
void counted_tile(const Weight& weight, int64_t tile, const Activations& x, int64_t row, Floats* out) {
  constexpr bool ROUNDED = BITS > 2;
  const Shape& shape = weight.shape;
  const int64_t units = shape.units() / shape.groups;
  const uint32_t* source = weight.codes(tile);
  const uint16_t* halves = x.halves + row * x.stride;
  static constexpr Counts<BITS> COUNTS;
  const Words differences = load<Words>(COUNTS.difference), threes = load<Words>(COUNTS.three);
  for (int m = 0; m < M; ++m) out[m] = floats_of(0);
  for (int64_t group = 0; group < shape.groups; ++group) {
    Floats scale = weight.scale(tile, group);
    if (shape.wide_scales) scale = round_to_bfloat16(scale);
    Floats sum[M][CHAINS<M>], extra[M][CHAINS<M>];
    for (int m = 0; m < M; ++m)
      for (int chain = 0; chain < CHAINS<M>; ++chain) sum[m][chain] = extra[m][chain] = floats_of(0);
    for (int64_t unit = 0; unit < units; ++unit) {
      fetch_ahead<BITS>(source);
#pragma GCC unroll 8
      for (int slot = 0; slot < SLOTS; ++slot) {
        const Words open = open_slot<BITS>(source, slot);
#pragma GCC unroll 2
        for (int byte = 0; byte < 2; ++byte) {
          const Words codes = byte == 0 ? open : open >> 8;
          const Words two = look_up_halves(differences, codes);
          const Words three = look_up_halves(threes, codes);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const uint32_t pair = pair_at(halves + m * x.stride, slot, byte);
            const int chain = (2 * slot + byte) % CHAINS<M>;
            sum[m][chain] = dot_halves(sum[m][chain], two, pair);
            if (ROUNDED) extra[m][chain] = dot_halves(extra[m][chain], three, pair);
          }
        }
      }
      source += BITS * LANES;
      halves += UNIT;
    }
    const Floats rest = round_to_bfloat16(3 * scale) - 3 * scale;
    for (int m = 0; m < M; ++m) {
      for (int chain = 1; chain < CHAINS<M>; ++chain) {
        sum[m][0] += sum[m][chain];
        extra[m][0] += extra[m][chain];
      }
      out[m] += scale * sum[m][0];
      if (ROUNDED) out[m] += rest * extra[m][0];
    }
  }
}
#endif

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
        fetch_ahead<BITS>(source);
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
#if defined(__AVX512BF16__)
  } else if (mode == Mode::ROUNDED && BITS <= 3 && !weight.zeros) {
    counted_tile<BITS <= 3 ? BITS : 3, M>(weight, tile, x, row, out);
#endif
  } else if (mode == Mode::ROUNDED) {
    weight.zeros ? exact_tile<BITS, M, true, false>(weight, tile, x, row, out)
                 : exact_tile<BITS, M, true, true>(weight, tile, x, row, out);
  } else {
    weight.zeros ? exact_tile<BITS, M, false, false>(weight, tile, x, row, out)
                 : exact_tile<BITS, M, false, true>(weight, tile, x, row, out);
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
