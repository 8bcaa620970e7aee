// Causal attention of bfloat16 operands with float32 sums, forward and backward.
//
// Plain C ABI, loaded through ctypes; attention.py holds the definition. The forward pass is the
// online softmax of FlashAttention (Dao 2022, algorithm 1): scores of a tile of queries with a
// block of keys, the running maximum and sum, probabilities rounded to bfloat16, their product with
// the values. Nothing is computed above the diagonal but the rest of a tile. Scores are kept in
// units of log2 e, so that exponentials are powers of two.
//
// Every sum has a fixed order: a task owns its outputs, and the parts of a key head's gradients
// that come from its query heads are added in the order of the heads afterwards.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define QF_HAS_ATTENTION 1
#include <cmath>
#include <limits>

#include "attention_backward.h"

namespace attention {
namespace {

// What is computed for a tile of queries and a block of keys.
struct Tile {
  float scores[TILE * KEYS];
  uint16_t probabilities[TILE * KEYS];
  float correction[TILE];
};

// Scores of `keys` keys from `first_key` on become probabilities relative to the new maximum.
void update_softmax(Tile& tile, int64_t first_query, int64_t first_key, int64_t keys, float factor,
                    float* maxima, __m512* sums) {
  const int64_t vectors = (keys + LANES - 1) / LANES;
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(factor);
  for (int r = 0; r < TILE; ++r) {
    float* scores = tile.scores + r * KEYS;
    __m512 largest = _mm512_set1_ps(maxima[r]);
    for (int64_t v = 0; v < vectors; ++v) {
      const __mmask16 mask = seen(first_query + r, first_key + v * LANES);
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + v * LANES), scale);
      const __m512 kept = _mm512_mask_blend_ps(mask, lowest, scaled);
      _mm512_storeu_ps(scores + v * LANES, kept);
      largest = _mm512_max_ps(kept, largest);
    }
    const float maximum = _mm512_reduce_max_ps(largest);
    tile.correction[r] = std::exp2(maxima[r] - maximum);
    maxima[r] = maximum;
    __m512 sum = _mm512_mul_ps(sums[r], _mm512_set1_ps(tile.correction[r]));
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512 score = _mm512_loadu_ps(scores + v * LANES);
      const __m512 value = pairs::exp2(_mm512_sub_ps(score, _mm512_set1_ps(maximum)));
      sum = _mm512_add_ps(sum, value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.probabilities + r * KEYS + v * LANES),
                          (__m256i)_mm512_cvtneps_pbh(value));
    }
    sums[r] = sum;
  }
}

// Space for one block of queries.
struct ForwardSpace {
  Tile tile;
  Buffer<uint16_t> queries;
  Buffer<float> outputs;
  float maxima[QUERIES];
  __m512 sums[QUERIES];

  explicit ForwardSpace(int64_t size) : queries(QUERIES * size), outputs(QUERIES * size) {}
};

// Outputs and log-sums of the queries of one block of one head.
void forward_block(const Shape& shape, const View& query, const View& out, int64_t batch,
                   int64_t head, int64_t first, const uint32_t* keys, const uint32_t* values,
                   float* log_sums, ForwardSpace& space) {
  const int64_t size = shape.size, count = std::min(QUERIES, shape.length - first);
  pairs::pack_rows(shape.rows(query, batch, head, first, QUERIES), QUERIES, space.queries.get());
  std::fill(space.maxima, space.maxima + QUERIES, -std::numeric_limits<float>::infinity());
  std::fill(space.sums, space.sums + QUERIES, _mm512_setzero_ps());
  for (int64_t key = 0; key < first + count; key += KEYS)
    for (int64_t row = 0; row < count; row += TILE) {
      const int64_t last = std::min(first + row + TILE, shape.length);
      const int64_t seen_keys = std::min(last - key, KEYS);
      if (seen_keys <= 0) continue;
      pairs::multiply(by_rows(space.queries.get() + row * size, size), from_panels(keys, key, size),
                      size / 2, (seen_keys + LANES - 1) / LANES, nullptr, space.tile.scores, KEYS);
      update_softmax(space.tile, first + row, key, seen_keys, shape.scale * LOG2E,
                     space.maxima + row, space.sums + row);
      pairs::multiply(by_rows(space.tile.probabilities, KEYS), from_row_pairs(values, key, size),
                      (seen_keys + 1) / 2, shape.vectors(), key ? space.tile.correction : nullptr,
                      space.outputs.get() + row * size, size);
    }
  for (int64_t row = 0; row < count; ++row) {
    const float sum = _mm512_reduce_add_ps(space.sums[row]);
    log_sums[row] = space.maxima[row] + std::log2(sum);
    for (int64_t d = 0; d < size; d += LANES)
      pairs::write(out, out.at(batch, head, first + row) + d,
                   _mm512_div_ps(_mm512_loadu_ps(space.outputs.get() + row * size + d),
                                 _mm512_set1_ps(sum)));
  }
}

}  // namespace
}  // namespace attention

using namespace attention;
#else
#define QF_HAS_ATTENTION 0
#endif

extern "C" {

// Whether this build has the instructions; without them the other functions are not there.
int qf_attention_available() { return QF_HAS_ATTENTION; }

#if QF_HAS_ATTENTION
// out = softmax(scale q kᵀ) v over keys not after the query. log_sums [batch, heads, length]
// float32 is log2 of the sums of exponentials, for the backward pass.
void qf_attention_forward(const Shape* given, const View* query, const View* key, const View* value,
                          const View* out, int threads, float* log_sums) {
  const Shape shape = *given;
  const int64_t heads = shape.batch * shape.key_heads, words = shape.panel_words();
  const int64_t group = shape.heads / shape.key_heads;
  const int64_t blocks = (shape.length + QUERIES - 1) / QUERIES;
  const Buffer<uint32_t> keys(heads * words), values(heads * words);
#pragma omp parallel num_threads(threads)
  {
    ForwardSpace space(shape.size);
#pragma omp for schedule(static)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t batch = h / shape.key_heads, head = h % shape.key_heads;
      pairs::pack_panels(shape.rows(*key, batch, head, 0, shape.length), shape.panels(),
                         keys.get() + h * words);
      pairs::pack_row_pairs(shape.rows(*value, batch, head, 0, shape.length),
                            shape.panels() * PANEL, values.get() + h * words);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shape.batch * shape.heads * blocks; ++task) {
      const int64_t row = task / blocks, first = task % blocks * QUERIES;
      const int64_t batch = row / shape.heads, head = row % shape.heads;
      const int64_t packed = (batch * shape.key_heads + head / group) * words;
      forward_block(shape, *query, *out, batch, head, first, keys.get() + packed,
                    values.get() + packed, log_sums + row * shape.length + first, space);
    }
  }
}

// Gradients of q, k and v for the gradient `slope` of `out`.
void qf_attention_backward(const Shape* given, const View* query, const View* key,
                           const View* value, const View* out, const View* slope,
                           const float* log_sums, int threads, const View* query_gradient,
                           const View* key_gradient, const View* value_gradient) {
  const Shape shape = *given;
  const int64_t heads = shape.batch * shape.key_heads, words = shape.panel_words();
  const int64_t group = shape.heads / shape.key_heads, matrix = shape.length * shape.size;
  // So many key heads at a time that threads wait little and what they share stays in the cache.
  const int64_t round = std::min<int64_t>(heads, (4 * threads + group - 1) / group);
  const Buffer<uint32_t> key_panels(round * words), value_panels(round * words);
  const Buffer<uint32_t> key_pairs(round * words);
  const Buffer<float> key_parts(round * group * matrix), value_parts(round * group * matrix);
#pragma omp parallel num_threads(threads)
  {
    BackwardSpace space(shape);
    for (int64_t start = 0; start < heads; start += round) {
      const int64_t count = std::min(round, heads - start);
#pragma omp for schedule(static)
      for (int64_t h = 0; h < count; ++h) {
        const int64_t batch = (start + h) / shape.key_heads, head = (start + h) % shape.key_heads;
        const Rows keys = shape.rows(*key, batch, head, 0, shape.length);
        pairs::pack_panels(keys, shape.panels(), key_panels.get() + h * words);
        pairs::pack_panels(shape.rows(*value, batch, head, 0, shape.length), shape.panels(),
                           value_panels.get() + h * words);
        pairs::pack_row_pairs(keys, shape.panels() * PANEL, key_pairs.get() + h * words);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * group; ++task) {
        // Query heads of all sequences are numbered as key heads are, `group` to each.
        const int64_t row = start * group + task, at = task / group * words;
        const int64_t batch = row / shape.heads, head = row % shape.heads;
        const PackedHead packed{key_panels.get() + at, value_panels.get() + at,
                                key_pairs.get() + at};
        pack_queries(shape, *query, *out, *slope, batch, head, log_sums + row * shape.length,
                     space);
        backward_head(shape, packed, *query_gradient, batch, head, key_parts.get() + task * matrix,
                      value_parts.get() + task * matrix, space);
      }
#pragma omp for schedule(static)
      for (int64_t line = 0; line < count * shape.length; ++line) {
        const int64_t h = line / shape.length, row = line % shape.length, at = h * group * matrix;
        const int64_t batch = (start + h) / shape.key_heads, head = (start + h) % shape.key_heads;
        add_parts(shape, key_parts.get() + at, *key_gradient, batch, head, row, shape.scale);
        add_parts(shape, value_parts.get() + at, *value_gradient, batch, head, row, 1.0f);
      }
    }
  }
}
#endif

}  // extern "C"
