// The layout the kernels read, made once at load from the words of a checkpoint.
//
// Rows are taken sixteen at a time (a tile), columns thirty-two (a unit). A unit of `bits` wide codes
// is `bits` vectors of sixteen 32-bit lanes, lane = row: as many bits as the codes have. A width is
// cut into planes of 8, 4, 2 and 1 bits (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1), low plane first.
// Column c of a unit is byte c % 4 of slot c / 4. A plane of p bits holds slot s in vector
// s·p / 8, at bits p·(s mod (8/p)) of every byte. So one shift and one mask give four columns of
// sixteen rows as unsigned bytes, which is what an 8-bit dot product takes.
//
// Three arrays: codes [tile, unit, bits, 16] words, scales [tile, group, 16] bfloat16 or float32, and
// zero-points [tile, group, 16] bytes if there are any. Rows and columns beyond the matrix are zero.
#pragma once

#include "lanes.h"

namespace quantforge {

constexpr int UNIT = 32;
constexpr int SLOTS = 8;

struct Shape {
  int64_t rows, columns, groups;
  int bits;
  bool wide_scales;

  int64_t tiles() const { return (rows + LANES - 1) / LANES; }
  int64_t units() const { return (columns + UNIT - 1) / UNIT; }
  int64_t width() const { return columns / groups; }
  // Whether every unit lies inside one group, so that a group is a whole number of units.
  bool aligned() const { return groups == 1 || width() % UNIT == 0; }
};

struct Weight {
  Shape shape;
  const uint32_t* words;
  const void* scales;
  const uint8_t* zeros;  // null: the constant 2^(bits - 1)

  const uint32_t* codes(int64_t tile) const {
    return words + tile * shape.units() * shape.bits * LANES;
  }
  Floats scale(int64_t tile, int64_t group) const {
    const int64_t index = (tile * shape.groups + group) * LANES;
    if (shape.wide_scales) return load<Floats>(static_cast<const float*>(scales) + index);
    return widen(load<Halves>(static_cast<const uint16_t*>(scales) + index));
  }
  Integers zero(int64_t tile, int64_t group) const {
    if (!zeros) return integers_of(1 << (shape.bits - 1));
    return extend(load<Bytes>(zeros + (tile * shape.groups + group) * LANES));
  }
};

// The plane of `PLANE` bits, whose vectors start at `source`: or its slots, moved up by `UP` bits,
// into `slots`.
template <int PLANE, int UP>
QF_INLINE void add_plane(const uint32_t* source, Words* slots) {
  constexpr int A_VECTOR = 8 / PLANE;
  constexpr uint32_t MASK = ((1u << PLANE) - 1) * 0x01010101u << UP;
#pragma GCC unroll 8
  for (int vector = 0; vector < PLANE; ++vector) {
    const Words value = load<Words>(source + vector * LANES);
#pragma GCC unroll 8
    for (int part = 0; part < A_VECTOR; ++part) {
      const int shift = part * PLANE - UP;
      const Words moved = shift > 0 ? value >> shift : shift < 0 ? value << -shift : value;
      const Words field = PLANE == 8 ? moved : (moved & MASK);
      Words& slot = slots[vector * A_VECTOR + part];
      slot = UP == 0 ? field : (slot | field);
    }
  }
}

// Slot s of a unit: columns 4s … 4s+3 of sixteen rows, a byte each.
template <int BITS>
QF_INLINE void decode_unit(const uint32_t* source, Words* slots) {
  if constexpr (BITS == 8) {
    add_plane<8, 0>(source, slots);
  } else if constexpr (BITS >= 4) {
    add_plane<4, 0>(source, slots);
    if constexpr ((BITS & 2) != 0) add_plane<2, 4>(source + 4 * LANES, slots);
    if constexpr ((BITS & 1) != 0) {
      add_plane<1, BITS - 1>(source + (BITS - 1) * LANES, slots);
    }
  } else {
    add_plane<2, 0>(source, slots);
    if constexpr (BITS == 3) add_plane<1, 2>(source + 2 * LANES, slots);
  }
}

// Calls `function` with the width as a constant.
#define QF_WITH_WIDTH(bits, call) \
  switch (bits) {                 \
    case 2: { constexpr int BITS = 2; call; break; } \
    case 3: { constexpr int BITS = 3; call; break; } \
    case 4: { constexpr int BITS = 4; call; break; } \
    case 5: { constexpr int BITS = 5; call; break; } \
    case 6: { constexpr int BITS = 6; call; break; } \
    case 7: { constexpr int BITS = 7; call; break; } \
    case 8: { constexpr int BITS = 8; call; break; } \
  }

}  // namespace quantforge
