// Convolution as a product of matrices whose left one is gathered a chunk of positions at a time.
//
// Images are [batch, height, width, channels]. A row of the left matrix holds what one output
// position reads, in runs that lie together in the image: the order of the weight's columns is theirs.
// Padding is the code that means 0. Where a row is one place's channels, nothing is gathered.
#pragma once

#include "requantize.h"

namespace quantforge {

// Bytes that lie together in the image: `taps` neighbouring columns of `bytes` channels.
struct Run {
  int64_t down, across, channel, bytes, taps, target;
};

struct Places {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t stride_down, stride_across, padding_down, padding_across;
  int64_t parts;        // of the channels, convolved apart
  int64_t in_part;      // channels of a part
  int64_t out_part;     // output channels of a part
  int64_t row_bytes;    // of a gathered row
  int64_t run_count;
  bool direct;          // a position reads its own channels alone
  int32_t zero;         // of the input's grid

  int64_t positions() const { return batch * out_height * out_width; }
};

QF_INLINE void copy_bytes(uint8_t* to, const uint8_t* from, int64_t count) {
  for (; count >= 64; count -= 64, to += 64, from += 64) store(to, load<Quads>(from));
  for (; count >= 16; count -= 16, to += 16, from += 16) store(to, load<Bytes>(from));
  for (; count >= 4; count -= 4, to += 4, from += 4) std::memcpy(to, from, 4);
  for (; count > 0; --count) *to++ = *from++;
}

inline void gather_row(const Places& places, const Run* runs, const uint8_t* image, int64_t down,
                       int64_t across, int64_t first_channel, uint8_t* to) {
  const int64_t top = down * places.stride_down - places.padding_down;
  const int64_t left = across * places.stride_across - places.padding_across;
  for (int64_t index = 0; index < places.run_count; ++index) {
    const Run& run = runs[index];
    const int64_t y = top + run.down, x = left + run.across;
    uint8_t* target = to + run.target;
    if (y < 0 || y >= places.height) {
      std::memset(target, places.zero, run.taps * run.bytes);
      continue;
    }
    const int64_t row = y * places.width;
    if (x >= 0 && x + run.taps <= places.width) {
      const int64_t start = (row + x) * places.channels + first_channel + run.channel;
      copy_bytes(target, image + start, run.taps * run.bytes);
      continue;
    }
    for (int64_t tap = 0; tap < run.taps; ++tap, target += run.bytes) {
      if (x + tap < 0 || x + tap >= places.width) {
        std::memset(target, places.zero, run.bytes);
      } else {
        const int64_t start = (row + x + tap) * places.channels + first_channel + run.channel;
        copy_bytes(target, image + start, run.bytes);
      }
    }
  }
}

// Output positions [first, last) as rows.
inline void gather(const Places& places, const Run* runs, const uint8_t* x, int64_t first,
                   int64_t last, int64_t first_channel, uint8_t* to) {
  const int64_t image = places.height * places.width * places.channels;
  const int64_t a_picture = places.out_height * places.out_width;
  for (int64_t position = first; position < last; ++position, to += places.row_bytes) {
    const int64_t inside = position % a_picture;
    gather_row(places, runs, x + position / a_picture * image, inside / places.out_width,
               inside % places.out_width, first_channel, to);
  }
}

// Where the outputs of a panel go.
struct Target {
  int64_t tile, channel, channels;  // first tile, first output channel, and how many are left
};

// Sums of some positions of a panel, [position][tile]; `scaled` where they are scaled by group.
constexpr int MOST_SUMS = 24;
struct Sums {
  Integers whole[MOST_SUMS], counts[MOST_SUMS];
  Floats scaled[MOST_SUMS];
};

// M positions of a panel of NV tiles, slots [first, last).
template <int NV, int M, bool COUNT>
void product(const Rows& rows, const Words* panel, int64_t first, int64_t last,
             const Integers* start, Sums& result) {
  Integers sums[M][NV], counts[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    counts[m] = integers_of(0);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[m][v] = start[v];
  }
  multiply_slots<NV, M, COUNT>(rows, panel, first, last, sums, counts);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (COUNT) result.counts[m] = counts[m];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) result.whole[m * NV + v] = sums[m][v];
  }
}

// Σ (activation - zero) of a group, times what is added to every weight.
inline void add_shifts(const IntegerWeight& weight, int64_t positions, int64_t tiles, int64_t tile,
                       int64_t group, int32_t zero, Sums& sums) {
  const int32_t padding = zero * static_cast<int32_t>(4 * weight.group_slots);
  for (int64_t v = 0; v < tiles; ++v) {
    const int64_t index = ((tile + v) * weight.groups + group) * LANES;
    const Integers shift = load<Integers>(weight.shifts + index);
    for (int64_t m = 0; m < positions; ++m)
      sums.whole[m * tiles + v] += (sums.counts[m] - padding) * shift;
  }
}

inline void scale_group(const IntegerWeight& weight, int64_t positions, int64_t tiles, int64_t tile,
                        int64_t group, Sums& sums) {
  for (int64_t v = 0; v < tiles; ++v) {
    const Floats scale = load<Floats>(weight.scales + ((tile + v) * weight.groups + group) * LANES);
    for (int64_t m = 0; m < positions; ++m) {
      const Floats part = to_floats(sums.whole[m * tiles + v]) * scale;
      sums.scaled[m * tiles + v] = group == 0 ? part : sums.scaled[m * tiles + v] + part;
    }
  }
}

// Float numbers, tile by tile.
template <bool SCALED>
__attribute__((noinline)) void write_floats(const Sums& sums, const IntegerWeight& weight,
                                            int64_t positions, int64_t tiles, const Epilogue& to,
                                            const Target& target, int64_t position) {
  for (int64_t v = 0; v < tiles; ++v) {
    const int64_t tile = target.tile + v, channel = target.channel + v * LANES;
    const int64_t bytes = sizeof(float) * std::min<int64_t>(target.channels - v * LANES, LANES);
    const Floats scale = load<Floats>(weight.scales + tile * weight.groups * LANES);
    const Floats bias = load<Floats>(to.bias + tile * LANES);
    for (int64_t m = 0; m < positions; ++m) {
      const int64_t at = m * tiles + v;
      const Floats value = (SCALED ? sums.scaled[at] : to_floats(sums.whole[at]) * scale) + bias;
      const Floats inside = clamped(value, to.low, to.high);
      std::memcpy(static_cast<float*>(to.out) + (position + m) * to.stride + channel, &inside, bytes);
    }
  }
}

// Codes, a position's tiles at once.
template <int NV, bool SCALED>
__attribute__((noinline)) void write_codes(const Sums& sums, const IntegerWeight& weight,
                                           int64_t positions, const Epilogue& to,
                                           const Target& target, int64_t position) {
  Floats scale[NV], bias[NV];
  for (int v = 0; v < NV; ++v) {
    const int64_t tile = target.tile + v;
    scale[v] = load<Floats>(weight.scales + tile * weight.groups * LANES);
    bias[v] = load<Floats>(to.bias + tile * LANES);
  }
  uint8_t* out = static_cast<uint8_t*>(to.out) + position * to.stride + target.channel;
  for (int64_t m = 0; m < positions; ++m, out += to.stride) {
    Integers codes[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = m * NV + v;
      const Floats value = SCALED ? sums.scaled[at] : to_floats(sums.whole[at]) * scale[v];
      codes[v] = codes_of(value + bias[v], to);
    }
    store_tiles<NV>(out, codes, target.channels);
  }
}

// Codes through integers alone.
template <int NV>
__attribute__((noinline)) void write_dyadic(const Sums& sums, int64_t positions, const Epilogue& to,
                                            const Target& target, int64_t position) {
  uint8_t* out = static_cast<uint8_t*>(to.out) + position * to.stride + target.channel;
  for (int64_t m = 0; m < positions; ++m, out += to.stride) {
    Integers codes[NV];
    for (int v = 0; v < NV; ++v) {
      const Integers code = dyadic(sums.whole[m * NV + v], to, (target.tile + v) * LANES);
      codes[v] = clamped(code, to.least - to.zero, to.most - to.zero) + to.zero;
    }
    store_tiles<NV>(out, codes, target.channels);
  }
}

template <int NV>
void write_any(const Sums& sums, const IntegerWeight& weight, int64_t positions, const Epilogue& to,
               const Target& target, int64_t position) {
  const bool scaled = weight.groups > 1;
  if (to.result == Result::DYADIC) {
    write_dyadic<NV>(sums, positions, to, target, position);
  } else if (to.result == Result::CODES) {
    scaled ? write_codes<NV, true>(sums, weight, positions, to, target, position)
           : write_codes<NV, false>(sums, weight, positions, to, target, position);
  } else {
    scaled ? write_floats<true>(sums, weight, positions, NV, to, target, position)
           : write_floats<false>(sums, weight, positions, NV, to, target, position);
  }
}

// Positions at once, so that the sums stay in registers.
#if defined(__AVX512F__)
constexpr int AT_ONCE[5] = {0, 12, 10, 8, 6};
constexpr int MOST_TILES = 4;
#else
constexpr int AT_ONCE[5] = {0, 4, 2, 2, 2};
constexpr int MOST_TILES = 2;
#endif

template <int NV, int M>
void some_positions(const IntegerWeight& weight, const Rows& rows, const Words* panel, int32_t zero,
                    const Epilogue& to, const Target& target, int64_t position) {
  Sums sums;
  for (int64_t group = 0; group < weight.groups; ++group) {
    Integers start[NV];
    for (int v = 0; v < NV; ++v) {
      const int64_t index = ((target.tile + v) * weight.groups + group) * LANES;
      start[v] = load<Integers>(weight.sums + index) * -zero;
    }
    const int64_t first = group * weight.group_slots, last = first + weight.group_slots;
    if (weight.shifts) {
      product<NV, M, true>(rows, panel, first, last, start, sums);
      add_shifts(weight, M, NV, target.tile, group, zero, sums);
    } else {
      product<NV, M, false>(rows, panel, first, last, start, sums);
    }
    if (weight.groups > 1) scale_group(weight, M, NV, target.tile, group, sums);
  }
  write_any<NV>(sums, weight, M, to, target, position);
}

template <int NV>
void some_rows(const IntegerWeight& weight, Rows rows, const Words* panel, int32_t zero,
               const Epilogue& to, const Target& target, int64_t first, int64_t count) {
  constexpr int M = AT_ONCE[NV];
  const uint8_t* data = rows.data;
  for (int64_t done = 0; done < count;) {
    // The last positions are taken again rather than one by one.
    const int64_t at = count >= M ? std::min(done, count - M) : done;
    rows.data = data + at * rows.stride;
    if (count >= M) {
      some_positions<NV, M>(weight, rows, panel, zero, to, target, first + at);
      done = at + M;
    } else {
      some_positions<NV, 1>(weight, rows, panel, zero, to, target, first + at);
      ++done;
    }
  }
}

inline void any_rows(int64_t tiles, const IntegerWeight& weight, const Rows& rows,
                     const Words* panel, int32_t zero, const Epilogue& to, const Target& target,
                     int64_t first, int64_t count) {
  switch (tiles) {
    case 1: some_rows<1>(weight, rows, panel, zero, to, target, first, count); break;
    case 2: some_rows<2>(weight, rows, panel, zero, to, target, first, count); break;
#if defined(__AVX512F__)
    case 3: some_rows<3>(weight, rows, panel, zero, to, target, first, count); break;
    case 4: some_rows<4>(weight, rows, panel, zero, to, target, first, count); break;
#endif
  }
}

}  // namespace quantforge
