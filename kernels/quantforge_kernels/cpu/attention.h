// What both directions of attention share: sizes, memory, and the forms of operands.
#pragma once

#include <cstdlib>
#include <memory>

#include "pairs.h"

namespace attention {

using pairs::LANES;
using pairs::Left;
using pairs::PANEL;
using pairs::Right;
using pairs::Rows;
using pairs::TILE;
using pairs::View;

constexpr int64_t KEYS = 192;  // of a block
constexpr int64_t QUERIES = 192;  // of a block
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
inline Left by_rows(const void* rows, int64_t length) {
  return {static_cast<const uint32_t*>(rows), length / 2, 1};
}

// Right operand whose lanes are the rows of a matrix, packed in panels.
inline Right from_panels(const uint32_t* panels, int64_t first_row, int64_t size) {
  return {panels + first_row / PANEL * (size / 2) * PANEL, PANEL, size / 2 * PANEL};
}

// Right operand whose lanes are the columns of a matrix, packed in pairs of rows.
inline Right from_row_pairs(const uint32_t* words, int64_t first_row, int64_t size) {
  return {words + first_row / 2 * size, size, PANEL};
}

// Lanes of keys first_key + 0 .. 15 that `query` sees.
inline __mmask16 seen(int64_t query, int64_t first_key) {
  const int64_t count = query - first_key + 1;
  return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

}  // namespace attention
