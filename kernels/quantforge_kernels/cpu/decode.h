// One token through a Llama-shaped decoder: norms, packed products, rotary positions, attention over
// a key-value cache that was taken once. Everything is float32 but the weights.
//
// Layers that read one input (q/k/v, gate/up) share one preparation of it and one parallel loop over
// the tiles of all of them, whatever their widths.
#pragma once

#include <omp.h>

#include "activations.h"

namespace quantforge {

// A matrix of the network: packed, or `dense` in bfloat16 or float32, [rows, columns].
struct Matrix {
  const uint32_t* codes;
  const void* scales;
  const uint8_t* zeros;
  const int64_t* numbers;
  const void* dense;
  const float* bias;
  int64_t dense_half;

  Weight weight() const {
    const Shape shape{numbers[0], numbers[1], numbers[2], static_cast<int>(numbers[3]),
                      numbers[4] != 0};
    return Weight{shape, codes, scales, zeros};
  }
};

struct Layer {
  Matrix query, key, value, output, gate, up, down;
  const float *attention_norm, *feed_norm;
};

struct Network {
  int64_t hidden, feed, heads, key_heads, head_width, layers, capacity;
  float epsilon, attention_scale;
  int64_t quantized, threads;
  const Layer* layer;
  Matrix head;
  const float* final_norm;
  float *keys, *values;      // [layers, key_heads, capacity, head_width]
  const float *cosine, *sine;  // [capacity, head_width]
};

QF_INLINE float total_of(Floats value) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += value[lane];
  return total;
}

// Product of sixteen rows of a dense matrix with x, a row at a time.
template <bool HALF>
void dense_tile(const Matrix& matrix, int64_t tile, const float* x, float* y) {
  const int64_t rows = matrix.numbers[0], columns = matrix.numbers[1];
  const int64_t last = std::min<int64_t>(rows, (tile + 1) * LANES);
  for (int64_t row = tile * LANES; row < last; ++row) {
    const auto* half = static_cast<const uint16_t*>(matrix.dense) + row * columns;
    const auto* whole = static_cast<const float*>(matrix.dense) + row * columns;
    Floats sums[4] = {};
    int64_t column = 0;
    for (; column + 4 * LANES <= columns; column += 4 * LANES)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int64_t at = column + part * LANES;
        sums[part] += load<Floats>(x + at) *
                      (HALF ? widen(load<Halves>(half + at)) : load<Floats>(whole + at));
      }
    float sum = total_of(sums[0] + sums[1] + sums[2] + sums[3]);
    for (; column < columns; ++column)
      sum += x[column] * (HALF ? widen_one(half[column]) : whole[column]);
    y[row] = sum + (matrix.bias ? matrix.bias[row] : 0);
  }
}

// y_i = matrix_i x for up to three matrices of the same columns.
inline void products(const float* x, const Matrix* const* matrices, float* const* y, int count,
                     bool quantized, int threads) {
  constexpr int MOST = 3;
  static thread_local Scratch scratch[MOST];
  Activations activations[MOST];
  int64_t first[MOST + 1] = {0};
  const Mode mode = quantized ? Mode::QUANTIZED : Mode::FLOAT;
  for (int i = 0; i < count; ++i) {
    const Weight weight = matrices[i]->weight();
    first[i + 1] = first[i] + weight.shape.tiles();
    if (matrices[i]->dense) continue;
    const bool shared = i > 0 && !matrices[i - 1]->dense &&
                        matrices[i - 1]->weight().shape.groups == weight.shape.groups;
    activations[i] = shared ? activations[i - 1]
                            : prepare_activations(x, false, 1, weight.shape, mode, scratch[i]);
  }
  const int64_t tiles = first[count], step = std::max<int64_t>(1, tiles / (8 * threads));
#pragma omp parallel for num_threads(threads) schedule(dynamic, step)
  for (int64_t index = 0; index < tiles; ++index) {
    int i = 0;
    while (index >= first[i + 1]) ++i;
    const Matrix& matrix = *matrices[i];
    const int64_t tile = index - first[i], start = tile * LANES;
    if (matrix.dense) {
      matrix.dense_half ? dense_tile<true>(matrix, tile, x, y[i])
                        : dense_tile<false>(matrix, tile, x, y[i]);
      continue;
    }
    const Weight weight = matrix.weight();
    Floats out[1];
    tile_product(weight, tile, activations[i], 0, 1, mode, out);
    const int64_t rows = std::min<int64_t>(LANES, weight.shape.rows - start);
    for (int64_t lane = 0; lane < rows; ++lane)
      y[i][start + lane] = out[0][lane] + (matrix.bias ? matrix.bias[start + lane] : 0);
  }
}

// x · weight / sqrt(mean(x²) + epsilon)
inline void root_mean_square_norm(const float* x, const float* weight, int64_t count, float epsilon,
                                  float* y) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  const float factor = 1.0f / std::sqrt(static_cast<float>(sum / count) + epsilon);
  for (int64_t i = 0; i < count; ++i) y[i] = weight[i] * (x[i] * factor);
}

// Rotate the pairs (i, i + width / 2) of every head.
inline void rotate(float* states, int64_t heads, int64_t width, const float* cosine,
                   const float* sine) {
  const int64_t half = width / 2;
  for (int64_t head = 0; head < heads; ++head, states += width)
    for (int64_t i = 0; i < half; ++i) {
      const float low = states[i], high = states[i + half];
      states[i] = low * cosine[i] - high * sine[i];
      states[i + half] = high * cosine[i + half] + low * sine[i + half];
    }
}

// Attention of one query over `length` keys and values of its head.
inline void attend(const float* query, const float* keys, const float* values, int64_t length,
                   int64_t width, float scale, float* scores, float* out) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < length; ++t) {
    float score = 0;
    int64_t i = 0;
    Floats sum = floats_of(0);
    for (; i + LANES <= width; i += LANES)
      sum += load<Floats>(query + i) * load<Floats>(keys + t * width + i);
    for (; i < width; ++i) score += query[i] * keys[t * width + i];
    scores[t] = (score + total_of(sum)) * scale;
    largest = std::max(largest, scores[t]);
  }
  float total = 0;
  for (int64_t t = 0; t < length; ++t) total += scores[t] = std::exp(scores[t] - largest);
  std::fill(out, out + width, 0.0f);
  for (int64_t t = 0; t < length; ++t) {
    const float share = scores[t] / total;
    for (int64_t i = 0; i < width; ++i) out[i] += share * values[t * width + i];
  }
}

// Memory for one step.
struct Step {
  std::vector<float> normed, query, attended, added, gate, up, scores;

  explicit Step(const Network& net)
      : normed(net.hidden),
        query(net.heads * net.head_width),
        attended(net.heads * net.head_width),
        added(net.hidden),
        gate(net.feed),
        up(net.feed),
        scores(net.heads * net.capacity) {}
};

inline void attention_block(const Network& net, int64_t index, int64_t position, float* x,
                            Step& step) {
  const Layer& layer = net.layer[index];
  const int64_t width = net.head_width, threads = net.threads;
  const int64_t a_layer = net.key_heads * net.capacity * width;
  float *keys = net.keys + index * a_layer, *values = net.values + index * a_layer;
  std::vector<float> fresh(2 * net.key_heads * width);
  float *key = fresh.data(), *value = key + net.key_heads * width;
  root_mean_square_norm(x, layer.attention_norm, net.hidden, net.epsilon, step.normed.data());
  const Matrix* three[] = {&layer.query, &layer.key, &layer.value};
  float* outputs[] = {step.query.data(), key, value};
  products(step.normed.data(), three, outputs, 3, net.quantized != 0, threads);
  const float *cosine = net.cosine + position * width, *sine = net.sine + position * width;
  rotate(step.query.data(), net.heads, width, cosine, sine);
  rotate(key, net.key_heads, width, cosine, sine);
  for (int64_t head = 0; head < net.key_heads; ++head) {
    const int64_t at = (head * net.capacity + position) * width;
    std::copy_n(key + head * width, width, keys + at);
    std::copy_n(value + head * width, width, values + at);
  }
  const int64_t a_key = net.heads / net.key_heads, length = position + 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (length > 64)
  for (int64_t head = 0; head < net.heads; ++head) {
    const int64_t at = head / a_key * net.capacity * width;
    attend(step.query.data() + head * width, keys + at, values + at, length, width,
           net.attention_scale, step.scores.data() + head * net.capacity,
           step.attended.data() + head * width);
  }
  const Matrix* one[] = {&layer.output};
  float* added[] = {step.added.data()};
  products(step.attended.data(), one, added, 1, net.quantized != 0, threads);
  for (int64_t i = 0; i < net.hidden; ++i) x[i] += step.added[i];
}

inline void feed_block(const Network& net, int64_t index, float* x, Step& step) {
  const Layer& layer = net.layer[index];
  root_mean_square_norm(x, layer.feed_norm, net.hidden, net.epsilon, step.normed.data());
  const Matrix* two[] = {&layer.gate, &layer.up};
  float* outputs[] = {step.gate.data(), step.up.data()};
  products(step.normed.data(), two, outputs, 2, net.quantized != 0, net.threads);
  for (int64_t i = 0; i < net.feed; ++i)
    step.up[i] *= step.gate[i] / (1.0f + std::exp(-step.gate[i]));
  const Matrix* one[] = {&layer.down};
  float* added[] = {step.added.data()};
  products(step.up.data(), one, added, 1, net.quantized != 0, net.threads);
  for (int64_t i = 0; i < net.hidden; ++i) x[i] += step.added[i];
}

}  // namespace quantforge
