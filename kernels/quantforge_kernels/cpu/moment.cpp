// Second moments of bfloat16 rows, summed in float32: total += leftᵀ right.
//
// Plain C ABI, loaded through ctypes; moment.py holds the definition. Matrix libraries multiply
// bfloat16 into bfloat16, which a gram does not survive: its small eigenvalues lie below the rounding
// of its large entries. The instruction takes two tokens at a time, so both operands are first
// packed as pairs of tokens, in panels of PANEL features that lie together for all tokens. A tile of
// ROWS x PANEL sums then stays in registers while it runs over the tokens. Of a gram (left is right)
// only the panels on and below the diagonal are formed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define QF_HAS_PAIRS 1
#else
#define QF_HAS_PAIRS 0
#endif

namespace {

#if QF_HAS_PAIRS
constexpr int LANES = 16;
constexpr int VECTORS = 3;
constexpr int PANEL = LANES * VECTORS;
constexpr int ROWS = 8;
static_assert(PANEL % ROWS == 0, "a panel is cut into whole tiles");

// Pairs of tokens of one panel, [pairs][PANEL]; what lies outside the matrix is zero.
void pack_panel(const uint16_t* rows, int64_t tokens, int64_t features, int64_t first,
                uint32_t* panel) {
  const int64_t width = std::min<int64_t>(PANEL, features - first);
  for (int64_t token = 0; token < tokens; token += 2) {
    const uint16_t* even = rows + token * features + first;
    const uint16_t* odd = token + 1 < tokens ? even + features : nullptr;
    uint32_t* out = panel + token / 2 * PANEL;
    for (int64_t k = 0; k < width; ++k)
      out[k] = even[k] | (odd ? static_cast<uint32_t>(odd[k]) << 16 : 0u);
    std::fill(out + width, out + PANEL, 0u);
  }
}

// Sums of ROWS features of `left` with a whole panel of `right`, over all pairs of tokens.
void tile(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums) {
  __m512 total[ROWS][VECTORS];
  for (auto& row : total)
    for (auto& value : row) value = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh wide[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
      wide[v] = (__m512bh)_mm512_loadu_si512(right + pair * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto one = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[pair * PANEL + r]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) total[r][v] = _mm512_dpbf16_ps(total[r][v], one, wide[v]);
    }
  }
  std::memcpy(sums, total, sizeof total);
}
#endif

}  // namespace

extern "C" {

// Whether this build has the instruction; without it `qf_add_moment` does nothing.
int qf_moment_available() { return QF_HAS_PAIRS; }

// total [left_features, right_features] += leftᵀ right. left [tokens, left_features] and right
// [tokens, right_features] are bfloat16. With `right` null, right is left and the entries above the
// diagonal are of no meaning.
void qf_add_moment(const uint16_t* left, const uint16_t* right, int64_t tokens,
                   int64_t left_features, int64_t right_features, int threads, float* total) {
#if QF_HAS_PAIRS
  const bool symmetric = right == nullptr;
  const int64_t pairs = (tokens + 1) / 2;
  const int64_t left_panels = (left_features + PANEL - 1) / PANEL;
  const int64_t right_panels = symmetric ? 0 : (right_features + PANEL - 1) / PANEL;
  const std::unique_ptr<uint32_t[]> packed(new uint32_t[(left_panels + right_panels) * pairs * PANEL]);
  uint32_t* left_packed = packed.get();
  uint32_t* right_packed = symmetric ? left_packed : left_packed + left_panels * pairs * PANEL;
  const int64_t columns = symmetric ? left_features : right_features;
  const int64_t column_panels = symmetric ? left_panels : right_panels;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < left_panels + right_panels; ++p) {
      const bool is_left = p < left_panels;
      const int64_t own = is_left ? p : p - left_panels;
      pack_panel(is_left ? left : right, tokens, is_left ? left_features : right_features,
                 own * PANEL, (is_left ? left_packed : right_packed) + own * pairs * PANEL);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < left_panels * column_panels; ++block) {
      const int64_t i = block / column_panels, j = block % column_panels;
      if (symmetric && j > i) continue;
      float sums[ROWS * PANEL];
      const int64_t width = std::min<int64_t>(PANEL, columns - j * PANEL);
      for (int r = 0; r < PANEL && i * PANEL + r < left_features; r += ROWS) {
        tile(left_packed + i * pairs * PANEL + r, right_packed + j * pairs * PANEL, pairs, sums);
        const int64_t height = std::min<int64_t>(ROWS, left_features - i * PANEL - r);
        for (int64_t row = 0; row < height; ++row) {
          float* out = total + (i * PANEL + r + row) * columns + j * PANEL;
          for (int64_t k = 0; k < width; ++k) out[k] += sums[row * PANEL + k];
        }
      }
    }
  }
#endif
}

}  // extern "C"
