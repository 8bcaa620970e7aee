// Gradients of attention. With dO the gradient of the output, P the probabilities, delta = dO · O:
//
//     dV = Pᵀ dO     dP = dO Vᵀ     dS = P (dP − delta)     dQ = scale dS K     dK = scale dSᵀ Q
//
// P is computed again from the scores and the logarithm of the sums (FlashAttention-2, Dao 2023,
// algorithm 2). A block of keys is held while all queries that see it pass by; P and dS exist for a
// block only, in pairs of rows for dV and dK and in rows for dQ.
#pragma once

#include "attention.h"

namespace attention {

// Space for the backward pass of one head.
struct BackwardSpace {
  Buffer<uint16_t> queries, slopes;            // rows of q and of the output's gradient
  Buffer<uint32_t> query_pairs, slope_pairs;   // the same in pairs of rows
  Buffer<float> query_gradients, deltas, log_sums;
  Buffer<float> key_gradients, value_gradients;             // of one block of keys
  Buffer<uint32_t> probability_pairs, score_slope_pairs;    // [QUERIES / 2][KEYS]
  float scores[TILE * KEYS], slopes_of_probabilities[TILE * KEYS];
  uint16_t score_slopes[TILE * KEYS];

  explicit BackwardSpace(const Shape& s)
      : queries(s.padded() * s.size), slopes(s.padded() * s.size),
        query_pairs(s.padded() / 2 * s.size), slope_pairs(s.padded() / 2 * s.size),
        query_gradients(s.padded() * s.size), deltas(s.padded()), log_sums(s.padded()),
        key_gradients(KEYS * s.size), value_gradients(KEYS * s.size),
        probability_pairs(QUERIES / 2 * KEYS), score_slope_pairs(QUERIES / 2 * KEYS) {}
};

// Two rows of floats as bfloat16: [0] is (low row | high row), [1] the same in pairs of rows.
struct TwoRows {
  __m512i rows, pairs;
  TwoRows(__m512 low, __m512 high) : rows((__m512i)_mm512_cvtne2ps_pbh(high, low)) {
    const __m512i word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i upper = _mm512_slli_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(LANES)), 16);
    pairs = _mm512_permutexvar_epi16(_mm512_or_si512(word, upper), rows);
  }
};

// Probabilities and the scores' gradients of a tile, dS = P (dP - delta), in both forms.
inline void tile_slopes(BackwardSpace& space, int64_t first_query, int64_t row, int64_t first_key,
                 int64_t keys, float factor) {
  const float* log_sums = space.log_sums.get() + first_query;
  const float* deltas = space.deltas.get() + first_query;
  const __m512 scale = _mm512_set1_ps(factor);
  for (int r = 0; r < TILE; r += 2)
    for (int64_t k = 0; k < keys; k += LANES) {
      __m512 probability[2], slope[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (r + i) * KEYS + k;
        const __mmask16 mask = seen(first_query + r + i, first_key + k);
        const __m512 score = _mm512_loadu_ps(space.scores + at);
        const __m512 exponent = _mm512_fmsub_ps(score, scale, _mm512_set1_ps(log_sums[r + i]));
        probability[i] = _mm512_maskz_mov_ps(mask, pairs::exp2(exponent));
        const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(space.slopes_of_probabilities + at),
                                             _mm512_set1_ps(deltas[r + i]));
        slope[i] = _mm512_maskz_mul_ps(mask, probability[i], centred);
      }
      const TwoRows both(probability[0], probability[1]), slopes(slope[0], slope[1]);
      const int64_t pair_at = (row + r) / 2 * KEYS + k;
      _mm512_storeu_si512(space.probability_pairs.get() + pair_at, both.pairs);
      _mm512_storeu_si512(space.score_slope_pairs.get() + pair_at, slopes.pairs);
      auto* low = reinterpret_cast<__m256i*>(space.score_slopes + r * KEYS + k);
      auto* high = reinterpret_cast<__m256i*>(space.score_slopes + (r + 1) * KEYS + k);
      _mm256_storeu_si256(low, _mm512_castsi512_si256(slopes.rows));
      _mm256_storeu_si256(high, _mm512_extracti64x4_epi64(slopes.rows, 1));
    }
}

// What is read of one head's keys and values.
struct PackedHead {
  const uint32_t *key_panels, *value_panels, *key_pairs;
};

// The head's rows, and per query delta = dO · O.
inline void pack_queries(const Shape& shape, const View& query, const View& out, const View& slope,
                  int64_t batch, int64_t head, const float* log_sums, BackwardSpace& space) {
  const Rows queries = shape.rows(query, batch, head, 0, shape.length);
  const Rows slopes = shape.rows(slope, batch, head, 0, shape.length);
  const Rows outputs = shape.rows(out, batch, head, 0, shape.length);
  pairs::pack_rows(queries, shape.padded(), space.queries.get());
  pairs::pack_rows(slopes, shape.padded(), space.slopes.get());
  pairs::pack_row_pairs(queries, shape.padded(), space.query_pairs.get());
  pairs::pack_row_pairs(slopes, shape.padded(), space.slope_pairs.get());
  std::fill(space.deltas.get(), space.deltas.get() + shape.padded(), 0.0f);
  std::fill(space.log_sums.get(), space.log_sums.get() + shape.padded(), 0.0f);
  for (int64_t row = 0; row < shape.length; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < shape.size; d += LANES)
      sum = _mm512_fmadd_ps(pairs::widened(slopes.load(row, d)),
                            pairs::widened(outputs.load(row, d)), sum);
    space.deltas.get()[row] = _mm512_reduce_add_ps(sum);
    space.log_sums.get()[row] = log_sums[row];
  }
}

// Adds what the queries of one block give to their own gradients and to a block of keys.
inline void backward_block(const Shape& shape, const PackedHead& packed, int64_t first_query,
                    int64_t first_key, BackwardSpace& space) {
  const int64_t size = shape.size, vectors = shape.vectors();
  const int64_t queries = std::min(QUERIES, shape.padded() - first_query);
  for (int64_t row = 0; row < queries; row += TILE) {
    const int64_t query = first_query + row;
    const int64_t keys = std::min(std::min(query + TILE, shape.length) - first_key, KEYS);
    if (keys <= 0) continue;
    const int64_t key_vectors = (keys + LANES - 1) / LANES;
    pairs::multiply(by_rows(space.queries.get() + query * size, size),
                    from_panels(packed.key_panels, first_key, size), size / 2, key_vectors, nullptr,
                    space.scores, KEYS);
    pairs::multiply(by_rows(space.slopes.get() + query * size, size),
                    from_panels(packed.value_panels, first_key, size), size / 2, key_vectors,
                    nullptr, space.slopes_of_probabilities, KEYS);
    tile_slopes(space, query, row, first_key, keys, shape.scale * LOG2E);
    pairs::multiply(by_rows(space.score_slopes, KEYS),
                    from_row_pairs(packed.key_pairs, first_key, size), (keys + 1) / 2, vectors,
                    first_key ? ONES : nullptr, space.query_gradients.get() + query * size, size);
  }
  const int64_t keys = std::min(KEYS, shape.length - first_key);
  for (int64_t key = 0; key < keys; key += TILE) {
    // A tile of keys is seen from the tile of queries on that lies beside it.
    const int64_t first = std::max<int64_t>(0, first_key + key - first_query);
    if (first >= queries) break;
    const int64_t count = (queries - first) / 2, at = first / 2 * KEYS + key;
    pairs::multiply({space.probability_pairs.get() + at, 1, KEYS},
                    from_row_pairs(space.slope_pairs.get(), first_query + first, size), count,
                    vectors, ONES, space.value_gradients.get() + key * size, size);
    pairs::multiply({space.score_slope_pairs.get() + at, 1, KEYS},
                    from_row_pairs(space.query_pairs.get(), first_query + first, size), count,
                    vectors, ONES, space.key_gradients.get() + key * size, size);
  }
}

// Gradients of one head; those of keys and values are [length][size] parts to be added later.
inline void backward_head(const Shape& shape, const PackedHead& packed, const View& query_gradient,
                   int64_t batch, int64_t head, float* key_part, float* value_part,
                   BackwardSpace& space) {
  const int64_t size = shape.size;
  for (int64_t key = 0; key < shape.length; key += KEYS) {
    std::fill(space.key_gradients.get(), space.key_gradients.get() + KEYS * size, 0.0f);
    std::fill(space.value_gradients.get(), space.value_gradients.get() + KEYS * size, 0.0f);
    for (int64_t query = key / QUERIES * QUERIES; query < shape.length; query += QUERIES)
      backward_block(shape, packed, query, key, space);
    const int64_t entries = std::min(KEYS, shape.length - key) * size;
    std::copy_n(space.key_gradients.get(), entries, key_part + key * size);
    std::copy_n(space.value_gradients.get(), entries, value_part + key * size);
  }
  for (int64_t row = 0; row < shape.length; ++row)
    for (int64_t d = 0; d < size; d += LANES)
      pairs::write(query_gradient, query_gradient.at(batch, head, row) + d,
                   _mm512_mul_ps(_mm512_loadu_ps(space.query_gradients.get() + row * size + d),
                                 _mm512_set1_ps(shape.scale)));
}

// One row of a key head's gradient: the parts of its query heads, in order.
inline void add_parts(const Shape& shape, const float* parts, const View& gradient, int64_t batch,
               int64_t key_head, int64_t row, float factor) {
  const int64_t group = shape.heads / shape.key_heads, matrix = shape.length * shape.size;
  for (int64_t d = 0; d < shape.size; d += LANES) {
    const float* part = parts + row * shape.size + d;
    __m512 sum = _mm512_loadu_ps(part);
    for (int64_t other = 1; other < group; ++other)
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(part + other * matrix));
    pairs::write(gradient, gradient.at(batch, key_head, row) + d,
                 _mm512_mul_ps(sum, _mm512_set1_ps(factor)));
  }
}

}  // namespace attention
