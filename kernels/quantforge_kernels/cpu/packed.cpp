// C ABI of the packed kernels: sizes, repacking at load, products, and decoding of rows and tiles.
// See packed.h for the layout and gemv.h for the products.

#include <omp.h>

#include "decode.h"

using namespace quantforge;

namespace {

Shape shape_of(const int64_t* numbers) {
  return Shape{numbers[0], numbers[1], numbers[2], static_cast<int>(numbers[3]), numbers[4] != 0};
}

// Thirty-two codes of one row into lane `lane` of a unit.
void place_unit(const uint32_t* words, int64_t available, int bits, int lane, uint32_t* unit) {
  const uint32_t mask = (1u << bits) - 1;
  for (int column = 0; column < UNIT; ++column) {
    const int bit = column * bits, word = bit / 32, shift = bit % 32;
    uint64_t two = word < available ? words[word] : 0;
    if (shift + bits > 32 && word + 1 < available) two |= static_cast<uint64_t>(words[word + 1]) << 32;
    const uint32_t code = static_cast<uint32_t>(two >> shift) & mask;
    const int slot = column / 4, byte = 8 * (column % 4);
    int below = 0, first = 0;
    for (int plane = 8; plane >= 1; plane /= 2) {
      if (!(bits & plane)) continue;
      const int a_vector = 8 / plane;
      const uint32_t field = (code >> below) & ((1u << plane) - 1);
      unit[(first + slot / a_vector) * LANES + lane] |= field
                                                        << (byte + plane * (slot % a_vector));
      below += plane;
      first += plane;
    }
  }
}

void write_outputs(const Floats* out, int64_t rows, const Shape& shape, int64_t tile,
                   const void* bias, void* y, bool half) {
  const int64_t first = tile * LANES, count = std::min<int64_t>(LANES, shape.rows - first);
  for (int64_t row = 0; row < rows; ++row) {
    float values[LANES];
    store(values, out[row]);
    const int64_t start = row * shape.rows + first;
    if (half) {
      const uint16_t* offsets = static_cast<const uint16_t*>(bias);
      uint16_t* target = static_cast<uint16_t*>(y) + start;
      for (int64_t lane = 0; lane < count; ++lane)
        target[lane] = narrow_one(values[lane] + (bias ? widen_one(offsets[first + lane]) : 0));
    } else {
      const float* offsets = static_cast<const float*>(bias);
      float* target = static_cast<float*>(y) + start;
      for (int64_t lane = 0; lane < count; ++lane)
        target[lane] = values[lane] + (bias ? offsets[first + lane] : 0);
    }
  }
}

template <bool HALF>
QF_INLINE void store_weights(void* target, int64_t index, Floats values) {
  if constexpr (HALF) {
    store(static_cast<uint16_t*>(target) + index, narrow(values));
  } else {
    store(static_cast<float*>(target) + index, values);
  }
}

template <bool HALF>
QF_INLINE Floats scale_of(const Weight& weight, int64_t tile, int64_t group) {
  const Floats scale = weight.scale(tile, group);
  return HALF && weight.shape.wide_scales ? round_to_bfloat16(scale) : scale;
}

// Sixteen rows of the weight as columns of `target`, [columns, stride], any grouping.
template <bool HALF>
void unpack_any(const Weight& weight, int64_t tile, void* target, int64_t stride) {
  const Shape& shape = weight.shape;
  const uint32_t* source = weight.codes(tile);
  Words slots[SLOTS];
  for (int64_t column = 0; column < shape.columns; ++column) {
    const int64_t inside = column % UNIT, group = column / shape.width();
    if (inside == 0) {
      QF_WITH_WIDTH(shape.bits, decode_unit<BITS>(source, slots));
      source += shape.bits * LANES;
    }
    const Words code = (slots[inside / 4] >> static_cast<int>(8 * (inside % 4))) & 0xff;
    const Floats value = to_floats((Integers)code - weight.zero(tile, group));
    store_weights<HALF>(target, column * stride, value * scale_of<HALF>(weight, tile, group));
  }
}

// The same for N tiles side by side, whose groups and rows are whole units: with two tiles every
// cache line of a bfloat16 target is written once.
template <int BITS, bool HALF, int N>
void unpack_tiles(const Weight& weight, int64_t tile, void* target, int64_t stride) {
  const Shape& shape = weight.shape;
  const int64_t units = shape.units() / shape.groups;
  int64_t index = 0;
  for (int64_t unit = 0; unit < shape.units(); ++unit) {
    Words slots[N][SLOTS];
    Floats scale[N];
    Integers zero[N];
    for (int n = 0; n < N; ++n) {
      decode_unit<BITS>(weight.codes(tile + n) + unit * BITS * LANES, slots[n]);
      scale[n] = scale_of<HALF>(weight, tile + n, unit / units);
      zero[n] = weight.zero(tile + n, unit / units);
    }
#pragma GCC unroll 8
    for (int slot = 0; slot < SLOTS; ++slot) {
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte, index += stride) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          const Floats value = to_floats(byte_of(slots[n][slot], byte) - zero[n]) * scale[n];
          store_weights<HALF>(target, index + n * LANES, value);
        }
      }
    }
  }
}

template <bool HALF>
void unpack(const Weight& weight, int64_t tile, int64_t count, void* target, int64_t stride) {
  const int bits = weight.shape.bits;
  if (!weight.shape.aligned() || weight.shape.columns % UNIT != 0) {
    for (int64_t n = 0; n < count; ++n) {
      uint8_t* start = static_cast<uint8_t*>(target) + n * LANES * (HALF ? 2 : 4);
      unpack_any<HALF>(weight, tile + n, start, stride);
    }
  } else if (count == 2) {
    QF_WITH_WIDTH(bits, (unpack_tiles<BITS, HALF, 2>(weight, tile, target, stride)));
  } else {
    QF_WITH_WIDTH(bits, (unpack_tiles<BITS, HALF, 1>(weight, tile, target, stride)));
  }
}

// One row of the weight.
void decode_row(const Weight& weight, int64_t row, void* target, bool half) {
  const Shape& shape = weight.shape;
  const int64_t tile = row / LANES, lane = row % LANES, width = shape.width();
  const uint32_t* source = weight.codes(tile);
  Words slots[SLOTS];
  float scale = 0;
  int32_t zero = 0;
  for (int64_t column = 0; column < shape.columns; ++column) {
    const int64_t inside = column % UNIT;
    if (inside == 0) {
      QF_WITH_WIDTH(shape.bits, decode_unit<BITS>(source, slots));
      source += shape.bits * LANES;
    }
    if (column % width == 0) {
      scale = weight.scale(tile, column / width)[lane];
      if (half) scale = widen_one(narrow_one(scale));
      zero = weight.zero(tile, column / width)[lane];
    }
    const uint32_t code = (slots[inside / 4][lane] >> (8 * (inside % 4))) & 0xff;
    const float value = static_cast<float>(static_cast<int32_t>(code) - zero) * scale;
    if (half) {
      static_cast<uint16_t*>(target)[column] = narrow_one(value);
    } else {
      static_cast<float*>(target)[column] = value;
    }
  }
}

}  // namespace

// In every function `numbers` are rows, columns, groups, bits and whether scales are float32, and a
// weight is its codes, scales and zero-points (null if it is symmetric), prepared by `qf_prepare`.
extern "C" {

// Which instructions the library was built with: 3 AVX-512 with VNNI, 2 AVX2, 1 anything else; and 4
// more if it rounds to bfloat16 in one instruction.
int qf_instructions() {
#if defined(__AVX512VNNI__)
  int level = 3;
#elif defined(__AVX2__)
  int level = 2;
#else
  int level = 1;
#endif
#if defined(__AVX512BF16__)
  level += 4;
#endif
  return level;
}

// Repack words [rows, a_row], scales and zeros [rows, groups] into `codes`, `scales` and `zeros`, all
// filled with zeros before.
void qf_prepare(const uint32_t* words, int64_t a_row, const void* scale, const uint8_t* zero,
                const int64_t* numbers, int threads, uint32_t* codes, void* scales,
                uint8_t* zeros) {
  const Shape shape = shape_of(numbers);
  const int64_t size = shape.wide_scales ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
    const int64_t count = std::min<int64_t>(LANES, shape.rows - tile * LANES);
    uint32_t* units = codes + tile * shape.units() * shape.bits * LANES;
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t row = tile * LANES + lane;
      for (int64_t unit = 0; unit < shape.units(); ++unit)
        place_unit(words + row * a_row + unit * shape.bits, a_row - unit * shape.bits, shape.bits,
                   static_cast<int>(lane), units + unit * shape.bits * LANES);
      for (int64_t group = 0; group < shape.groups; ++group) {
        const int64_t index = (tile * shape.groups + group) * LANES + lane;
        const int64_t from = row * shape.groups + group;
        std::memcpy(static_cast<uint8_t*>(scales) + size * index,
                    static_cast<const uint8_t*>(scale) + size * from, size);
        if (zero) zeros[index] = zero[from];
      }
    }
  }
}

// y [count, rows] = x [count, columns] · weightᵀ + bias. Floats are bfloat16 where `half` says so,
// and the weight is then rounded to it unless mode is 2, which quantizes x.
void qf_linear(const void* x, const uint32_t* codes, const void* scales, const uint8_t* zeros,
               const int64_t* numbers, const void* bias, int64_t count, int half, int quantized,
               int threads, void* y) {
  const Weight weight{shape_of(numbers), codes, scales, zeros};
  const Mode mode = quantized ? Mode::QUANTIZED : half ? Mode::ROUNDED : Mode::FLOAT;
  static thread_local Scratch scratch;
  const Activations activations =
      prepare_activations(x, half != 0, count, weight.shape, mode, scratch);
  const int64_t tiles = weight.shape.tiles();
  const int64_t step = std::max<int64_t>(1, tiles / (8 * threads));
  constexpr int64_t AT_ONCE = 4;
#pragma omp parallel for num_threads(threads) schedule(dynamic, step) if (tiles > 1)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    Floats out[AT_ONCE];
    for (int64_t row = 0; row < count; row += AT_ONCE) {
      const int64_t some = std::min(AT_ONCE, count - row);
      tile_product(weight, tile, activations, row, some, mode, out);
      const int64_t size = half ? 2 : 4;
      write_outputs(out, some, weight.shape, tile, bias,
                    static_cast<uint8_t*>(y) + size * row * weight.shape.rows, half != 0);
    }
  }
}

// Rows [16 first, 16 last) of the weight, transposed: target is [columns, 16 (last - first)].
void qf_unpack(const uint32_t* codes, const void* scales, const uint8_t* zeros,
               const int64_t* numbers, int64_t first, int64_t last, int half, int threads,
               void* target) {
  const Weight weight{shape_of(numbers), codes, scales, zeros};
  const int64_t stride = (last - first) * LANES, size = half ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = first; tile < last; tile += 2) {
    void* start = static_cast<uint8_t*>(target) + size * LANES * (tile - first);
    const int64_t count = std::min<int64_t>(2, last - tile);
    half ? unpack<true>(weight, tile, count, start, stride)
         : unpack<false>(weight, tile, count, start, stride);
  }
}

// Row ids[i] of the weight as row i of `target`, [count, columns].
void qf_rows(const uint32_t* codes, const void* scales, const uint8_t* zeros,
             const int64_t* numbers, const int64_t* ids, int64_t count, int half, void* target) {
  const Weight weight{shape_of(numbers), codes, scales, zeros};
  const int64_t size = (half ? 2 : 4) * weight.shape.columns;
  for (int64_t index = 0; index < count; ++index)
    decode_row(weight, ids[index], static_cast<uint8_t*>(target) + size * index, half != 0);
}

// The token whose embedding is x [hidden] at `position`: its keys and values enter the cache, x is
// worked on in place, and `logits` [vocabulary] are of the token that follows.
void qf_decode(const Network* network, int64_t position, float* x, float* logits) {
  const Network& net = *network;
  Step step(net);
  for (int64_t layer = 0; layer < net.layers; ++layer) {
    attention_block(net, layer, position, x, step);
    feed_block(net, layer, x, step);
  }
  root_mean_square_norm(x, net.final_norm, net.hidden, net.epsilon, step.normed.data());
  const Matrix* one[] = {&net.head};
  float* outputs[] = {logits};
  products(step.normed.data(), one, outputs, 1, net.quantized != 0, static_cast<int>(net.threads));
}

// Sum of `count` words, read once by all threads: what the machine can stream.
uint64_t qf_stream(const uint64_t* words, int64_t count, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t index = 0; index < count; ++index) total += words[index];
  return total;
}

}  // extern "C"
