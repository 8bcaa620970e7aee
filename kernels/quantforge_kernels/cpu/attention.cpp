// Causal attention of bfloat16 operands with float32 sums, forward and backward.
//
// Plain C ABI, loaded through ctypes; attention.py holds the definition. The forward pass is the
// online softmax of FlashAttention (Dao 2022, algorithm 1): scores of a tile of queries with a block
// of keys, the running maximum and sum, probabilities rounded to bfloat16, their product with the
// values. The backward pass computes the probabilities again from the logarithm of the sums (Dao
// 2023, algorithm 2). Nothing is computed above the diagonal but the rest of a tile. Scores are kept
// in units of log2 e, so that exponentials are powers of two.
//
// Every sum has a fixed order: a task owns its outputs, and the parts that a key head's gradients get
// from its query heads are added in the order of the heads afterwards.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "pairs.h"
#define QF_HAS_ATTENTION 1

namespace {

using pairs::LANES;
using pairs::Left;
using pairs::PANEL;
using pairs::Right;
using pairs::Rows;
using pairs::TILE;
using pairs::View;

constexpr int64_t KEYS = 192;     // of a block
constexpr int64_t QUERIES = 96;   // of a block
static_assert(KEYS % PANEL == 0 && KEYS % TILE == 0 && QUERIES % TILE == 0 && TILE % 2 == 0, "");
constexpr float ONES[TILE] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
constexpr float LOG2E = 1.44269504088896340736f;

struct Shape {
  int64_t batch, heads, key_heads, length, size;
  float scale;

  int64_t panels() const { return (length + PANEL - 1) / PANEL; }
  int64_t vectors() const { return size / LANES; }
  int64_t panel_words() const { return panels() * PANEL * size / 2; }
  int64_t padded() const { return (length + TILE - 1) / TILE * TILE; }
  Rows rows(const View& view, int64_t batch_index, int64_t head, int64_t first,
            int64_t count) const {
    return {&view, batch_index, head, first, std::min(count, length - first), size};
  }
};

// Uninitialised memory on a cache line's boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (data_ == nullptr) std::abort();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Left operand whose rows lie one after another, a pair in each word.
Left by_rows(const void* rows, int64_t length) {
  return {static_cast<const uint32_t*>(rows), length / 2, 1};
}

// Right operand whose lanes are the rows of a matrix, packed in panels.
Right from_panels(const uint32_t* panels, int64_t first_row, int64_t size) {
  return {panels + first_row / PANEL * (size / 2) * PANEL, PANEL, size / 2 * PANEL};
}

// Right operand whose lanes are the columns of a matrix, packed in pairs of rows.
Right from_row_pairs(const uint32_t* words, int64_t first_row, int64_t size) {
  return {words + first_row / 2 * size, size, PANEL};
}

// Lanes of keys first_key + 0 .. 15 that `query` sees.
__mmask16 seen(int64_t query, int64_t first_key) {
  const int64_t count = query - first_key + 1;
  return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// One head's keys and values, and the running state of a tile of queries.
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
  for (int r = 0; r < TILE; ++r) {
    float* scores = tile.scores + r * KEYS;
    __m512 largest = _mm512_set1_ps(maxima[r]);
    for (int64_t v = 0; v < vectors; ++v) {
      const __mmask16 mask = seen(first_query + r, first_key + v * LANES);
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + v * LANES), _mm512_set1_ps(factor));
      const __m512 kept = _mm512_mask_blend_ps(mask, lowest, scaled);
      _mm512_storeu_ps(scores + v * LANES, kept);
      largest = _mm512_max_ps(kept, largest);
    }
    const float maximum = _mm512_reduce_max_ps(largest);
    tile.correction[r] = std::exp2(maxima[r] - maximum);
    maxima[r] = maximum;
    __m512 sum = _mm512_mul_ps(sums[r], _mm512_set1_ps(tile.correction[r]));
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + v * LANES), _mm512_set1_ps(maximum));
      const __m512 value = pairs::exp2(shifted);
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
void tile_slopes(BackwardSpace& space, int64_t first_query, int64_t row, int64_t first_key,
                 int64_t keys, float factor) {
  const float* log_sums = space.log_sums.get() + first_query;
  const float* deltas = space.deltas.get() + first_query;
  for (int r = 0; r < TILE; r += 2)
    for (int64_t k = 0; k < keys; k += LANES) {
      __m512 probability[2], slope[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (r + i) * KEYS + k;
        const __mmask16 mask = seen(first_query + r + i, first_key + k);
        const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(space.scores + at), _mm512_set1_ps(factor),
                                                _mm512_set1_ps(log_sums[r + i]));
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
void pack_queries(const Shape& shape, const View& query, const View& out, const View& slope,
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
      sum = _mm512_fmadd_ps(pairs::widened(slopes.load(row, d)), pairs::widened(outputs.load(row, d)), sum);
    space.deltas.get()[row] = _mm512_reduce_add_ps(sum);
    space.log_sums.get()[row] = log_sums[row];
  }
}

// Adds what the queries of one block give to their own gradients and to a block of keys.
void backward_block(const Shape& shape, const PackedHead& packed, int64_t first_query,
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
                    from_panels(packed.value_panels, first_key, size), size / 2, key_vectors, nullptr,
                    space.slopes_of_probabilities, KEYS);
    tile_slopes(space, query, row, first_key, keys, shape.scale * LOG2E);
    pairs::multiply(by_rows(space.score_slopes, KEYS), from_row_pairs(packed.key_pairs, first_key, size),
                    (keys + 1) / 2, vectors, first_key ? ONES : nullptr,
                    space.query_gradients.get() + query * size, size);
  }
  const int64_t keys = std::min(KEYS, shape.length - first_key);
  for (int64_t key = 0; key < keys; key += TILE) {
    // A tile of keys is seen from the tile of queries on that lies beside it.
    const int64_t first = std::max<int64_t>(0, first_key + key - first_query);
    if (first >= queries) break;
    const int64_t count = (queries - first) / 2, at = first / 2 * KEYS + key;
    pairs::multiply({space.probability_pairs.get() + at, 1, KEYS},
                    from_row_pairs(space.slope_pairs.get(), first_query + first, size), count, vectors,
                    ONES, space.value_gradients.get() + key * size, size);
    pairs::multiply({space.score_slope_pairs.get() + at, 1, KEYS},
                    from_row_pairs(space.query_pairs.get(), first_query + first, size), count, vectors,
                    ONES, space.key_gradients.get() + key * size, size);
  }
}

// Gradients of one head; those of keys and values are [length][size] parts to be added later.
void backward_head(const Shape& shape, const PackedHead& packed, const View& query_gradient,
                   int64_t batch, int64_t head, float* key_part, float* value_part,
                   BackwardSpace& space) {
  const int64_t size = shape.size;
  for (int64_t key = 0; key < shape.length; key += KEYS) {
    std::fill(space.key_gradients.get(), space.key_gradients.get() + KEYS * size, 0.0f);
    std::fill(space.value_gradients.get(), space.value_gradients.get() + KEYS * size, 0.0f);
    for (int64_t query = key / QUERIES * QUERIES; query < shape.length; query += QUERIES)
      backward_block(shape, packed, query, key, space);
    const int64_t entries = std::min(KEYS, shape.length - key) * size;
    std::copy(space.key_gradients.get(), space.key_gradients.get() + entries, key_part + key * size);
    std::copy(space.value_gradients.get(), space.value_gradients.get() + entries,
              value_part + key * size);
  }
  for (int64_t row = 0; row < shape.length; ++row)
    for (int64_t d = 0; d < size; d += LANES)
      pairs::write(query_gradient, query_gradient.at(batch, head, row) + d,
                   _mm512_mul_ps(_mm512_loadu_ps(space.query_gradients.get() + row * size + d),
                                 _mm512_set1_ps(shape.scale)));
}

// One row of a key head's gradient: the parts of its query heads, in order.
void add_parts(const Shape& shape, const float* parts, const View& gradient, int64_t batch,
               int64_t key_head, int64_t row, float factor) {
  const int64_t group = shape.heads / shape.key_heads, matrix = shape.length * shape.size;
  const float* first = parts + (batch * shape.heads + key_head * group) * matrix + row * shape.size;
  for (int64_t d = 0; d < shape.size; d += LANES) {
    __m512 sum = _mm512_loadu_ps(first + d);
    for (int64_t part = 1; part < group; ++part)
      sum = _mm512_add_ps(sum, _mm512_loadu_ps(first + part * matrix + d));
    pairs::write(gradient, gradient.at(batch, key_head, row) + d,
                 _mm512_mul_ps(sum, _mm512_set1_ps(factor)));
  }
}

}  // namespace
#else
#define QF_HAS_ATTENTION 0
struct View;
struct Shape;
#endif

extern "C" {

// Whether this build has the instructions; without them the other functions are not there.
int qf_attention_available() { return QF_HAS_ATTENTION; }

#if QF_HAS_ATTENTION
// out = softmax(scale q kᵀ) v below the diagonal; log_sums [batch, heads, length] float32 is log2 of
// the sums of exponentials, for the backward pass.
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
  const Buffer<uint32_t> key_panels(heads * words), value_panels(heads * words), key_pairs(heads * words);
  const Buffer<float> key_parts(shape.batch * shape.heads * matrix);
  const Buffer<float> value_parts(shape.batch * shape.heads * matrix);
#pragma omp parallel num_threads(threads)
  {
    BackwardSpace space(shape);
#pragma omp for schedule(static)
    for (int64_t h = 0; h < heads; ++h) {
      const Rows keys = shape.rows(*key, h / shape.key_heads, h % shape.key_heads, 0, shape.length);
      const Rows values = shape.rows(*value, h / shape.key_heads, h % shape.key_heads, 0, shape.length);
      pairs::pack_panels(keys, shape.panels(), key_panels.get() + h * words);
      pairs::pack_panels(values, shape.panels(), value_panels.get() + h * words);
      pairs::pack_row_pairs(keys, shape.panels() * PANEL, key_pairs.get() + h * words);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < shape.batch * shape.heads; ++row) {
      const int64_t batch = row / shape.heads, head = row % shape.heads;
      const int64_t at = (batch * shape.key_heads + head / group) * words;
      const PackedHead packed{key_panels.get() + at, value_panels.get() + at, key_pairs.get() + at};
      pack_queries(shape, *query, *out, *slope, batch, head, log_sums + row * shape.length, space);
      backward_head(shape, packed, *query_gradient, batch, head, key_parts.get() + row * matrix,
                    value_parts.get() + row * matrix, space);
    }
#pragma omp for schedule(static)
    for (int64_t line = 0; line < heads * shape.length; ++line) {
      const int64_t h = line / shape.length, row = line % shape.length;
      const int64_t batch = h / shape.key_heads, head = h % shape.key_heads;
      add_parts(shape, key_parts.get(), *key_gradient, batch, head, row, shape.scale);
      add_parts(shape, value_parts.get(), *value_gradient, batch, head, row, 1.0f);
    }
  }
}
#endif

}  // extern "C"
