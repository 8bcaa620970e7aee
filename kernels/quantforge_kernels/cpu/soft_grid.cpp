// Weights drawn softly to a uniform grid, forward and backward in one pass each.
//
// Plain C ABI, loaded through ctypes; soft_grid.py holds the definition. Relative to the nearest
// level n, at f = x - n, the level j steps up has the weight
//
//     exp((2 j f - j^2) / T) = up^j q^(j^2 - j),    up = exp((2 f - 1) / T),   q = exp(-1 / T)
//
// and the one j steps down likewise with -f. So two exponentials an element serve all levels, and
// nothing overflows: inside the grid both are at most 1. Nothing is kept but the weight and the
// scale, and sixteen elements go side by side.
#include <type_traits>

#include "lanes.h"

namespace quantforge {

constexpr int LARGEST_RADIUS = 16;
// 1.5 * 2^23: adding it rounds to whole numbers, ties to even.
constexpr float ROUNDER = 12582912.0f;
constexpr float VANISHING = -60.0f;  // 2 to this is nothing beside 1, and its square is normal

// As soft_grid.py fills it in; names as there.
struct Grid {
  float top;
  float keep, pressure;  // shares of the weight itself and of the soft one
  float reach;           // of the straight-through gradient beyond the grid's ends
  float sharpness;       // log2(e) / T; unused where radius is 0
  float variance_slope;  // 2 / T
  int32_t radius;        // neighbours on each side; 0 for hard rounding
  // q^(j^2 - j) times 1, j and j^2.
  float zeroth[LARGEST_RADIUS + 1], first[LARGEST_RADIUS + 1], second[LARGEST_RADIUS + 1];
};

struct Layer {
  int64_t rows, groups, width, zero_stride;
  int32_t threads;
};

namespace {

// Not a number stays so in all of these.
QF_INLINE Floats at_least(Floats value, float low) {
  return value < floats_of(low) ? floats_of(low) : value;
}

QF_INLINE Floats at_most(Floats value, Floats high) { return value > high ? high : value; }

// Exact below 2^22; what is larger stays large.
QF_INLINE Floats rounded(Floats value) { return (value + ROUNDER) - ROUNDER; }

// 2^x for x <= 0, and 0 below VANISHING, by the Taylor polynomial on [-1/2, 1/2], which is off by
// 5e-9 before rounding. It has to be 0: slopes by the scale multiply it by any position.
QF_INLINE Floats power_of_two(Floats x) {
  const Floats safe = at_least(x, VANISHING);
  const Floats whole = rounded(safe), part = safe - whole;
  Floats value = floats_of(1.5252734e-5f);
  value = value * part + 1.5403530e-4f;
  value = value * part + 1.3333558e-3f;
  value = value * part + 9.6181291e-3f;
  value = value * part + 5.5504109e-2f;
  value = value * part + 2.4022651e-1f;
  value = value * part + 6.9314718e-1f;
  value = value * part + 1.0f;
  const Integers bits = (Integers)value + (__builtin_convertvector(whole, Integers) << 23);
  return x < floats_of(VANISHING) ? Floats{} : (Floats)bits;
}

// Sixteen weights on the grid.
struct Soft {
  Floats position;  // weight / scale
  Floats level;     // expected code - zero
  Floats slope;     // derivative of `level` by `position`
};

template <bool SLOPE>
QF_INLINE Soft soften(Floats weight, float scale, float zero, const Grid& grid) {
  const Floats position = weight / floats_of(scale), code = position + zero;
  const Floats nearest = at_most(at_least(rounded(code), 0.0f), floats_of(grid.top));
  const Floats level = nearest - zero;
  Soft soft{position, level, Floats{}};
  if (grid.radius == 0) {
    const Integers inside =
        (code >= floats_of(-grid.reach)) & (code <= floats_of(grid.top + grid.reach));
    if (SLOPE) soft.slope = inside ? floats_of(1.0f) : Floats{};
    return soft;
  }
  // Beyond the last level there is none to go up to: the exponent is cut before it overflows.
  const Floats twice = 2.0f * (position - level);
  const Floats up = power_of_two(at_most((twice - 1.0f) * grid.sharpness, Floats{}));
  const Floats down = power_of_two(at_most((-twice - 1.0f) * grid.sharpness, Floats{}));
  const Floats above = grid.top - nearest;
  Floats climbing = up, falling = down;
  Floats total = floats_of(1.0f), first = Floats{}, second = Floats{};
  for (int step = 1; step <= grid.radius; ++step) {
    const Floats distance = floats_of(static_cast<float>(step));
    const Floats higher = above >= distance ? climbing : Floats{};
    const Floats lower = nearest >= distance ? falling : Floats{};
    const Floats both = higher + lower;
    total += grid.zeroth[step] * both;
    first += grid.first[step] * (higher - lower);
    if (SLOPE) second += grid.second[step] * both;
    climbing *= up;
    falling *= down;
  }
  const Floats inverse = 1.0f / total, mean = first * inverse;
  soft.level = level + mean;
  if (SLOPE) soft.slope = (second * inverse - mean * mean) * grid.variance_slope;
  return soft;
}

QF_INLINE Floats read(const float* from) { return load<Floats>(from); }
QF_INLINE Floats read(const uint16_t* from) { return widen(load<Halves>(from)); }
QF_INLINE void write(float* to, Floats value) { store(to, value); }
QF_INLINE void write(uint16_t* to, Floats value) { store(to, narrow(value)); }

// `count` < LANES elements, then zeros.
template <typename T>
QF_INLINE Floats read_some(const T* from, int64_t count) {
  T padded[LANES] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return read(padded);
}

template <typename T>
QF_INLINE void write_some(T* to, Floats value, int64_t count) {
  T padded[LANES];
  write(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}

QF_INLINE Floats used(Floats weight, float scale, float zero, const Grid& grid) {
  const Floats soft = soften<false>(weight, scale, zero, grid).level * scale;
  return grid.keep == 0.0f ? soft : grid.keep * weight + grid.pressure * soft;
}

template <typename W, typename O>
void make_group(const W* weight, float scale, float zero, const Grid& grid, int64_t width, O* out) {
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES)
    write(out + k, used(read(weight + k), scale, zero, grid));
  if (k < width)
    write_some(out + k, used(read_some(weight + k, width - k), scale, zero, grid), width - k);
}

// Slope of the loss by sixteen weights; adds that by the scale, lane by lane.
QF_INLINE Floats back(Floats weight, Floats gradient, float scale, float zero, const Grid& grid,
                      Floats& for_scale) {
  const Soft soft = soften<true>(weight, scale, zero, grid);
  // Where nothing slopes, the position counts for nothing, even if it is infinite.
  const Floats moved = soft.slope == Floats{} ? Floats{} : soft.position * soft.slope;
  for_scale += gradient * (soft.level - moved);
  return gradient * (grid.keep + grid.pressure * soft.slope);
}

template <typename W, typename G>
void back_group(const G* gradient, const W* weight, float scale, float zero, const Grid& grid,
                int64_t width, W* for_weight, float* for_scale) {
  Floats sums = Floats{};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES)
    write(for_weight + k, back(read(weight + k), read(gradient + k), scale, zero, grid, sums));
  if (const int64_t rest = width - k) {
    const Floats last = read_some(weight + k, rest), slope = read_some(gradient + k, rest);
    write_some(for_weight + k, back(last, slope, scale, zero, grid, sums), rest);
  }
  float total = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
  *for_scale = grid.pressure * total;
}

template <typename W, typename O>
void make_all(const Layer& layer, const Grid& grid, const W* weight, const float* scale,
              const float* zero, O* out) {
#pragma omp parallel for num_threads(layer.threads) schedule(static)
  for (int64_t group = 0; group < layer.rows * layer.groups; ++group)
    make_group(weight + group * layer.width, scale[group], zero[group * layer.zero_stride], grid,
               layer.width, out + group * layer.width);
}

template <typename W, typename G>
void back_all(const Layer& layer, const Grid& grid, const G* gradient, const W* weight,
              const float* scale, const float* zero, W* for_weight, float* for_scale) {
#pragma omp parallel for num_threads(layer.threads) schedule(static)
  for (int64_t group = 0; group < layer.rows * layer.groups; ++group)
    back_group(gradient + group * layer.width, weight + group * layer.width, scale[group],
               zero[group * layer.zero_stride], grid, layer.width,
               for_weight + group * layer.width, for_scale + group);
}

}  // namespace
}  // namespace quantforge

using namespace quantforge;

extern "C" {

// out = keep * weight + pressure * scale * (expected code - zero); weight and out are float32 where
// their flags say wide, else bfloat16.
void qf_soft_weight(const Layer* layer, const Grid* grid, const void* weight, int weight_wide,
                    const float* scale, const float* zero, void* out, int out_wide) {
  const auto run = [&](auto from, auto to) {
    make_all(*layer, *grid, static_cast<decltype(from)>(weight), scale, zero,
             static_cast<decltype(to)>(out));
  };
  using Wide = float*;
  using Half = uint16_t*;
  using ConstWide = const float*;
  using ConstHalf = const uint16_t*;
  if (weight_wide)
    out_wide ? run(ConstWide{}, Wide{}) : run(ConstWide{}, Half{});
  else
    out_wide ? run(ConstHalf{}, Wide{}) : run(ConstHalf{}, Half{});
}

// Slopes by weight (in the weight's dtype) and by scale, from the slope by `out`.
void qf_soft_gradients(const Layer* layer, const Grid* grid, const void* gradient,
                       int gradient_wide, const void* weight, int weight_wide, const float* scale,
                       const float* zero, void* for_weight, float* for_scale) {
  const auto run = [&](auto slope, auto to) {
    back_all(*layer, *grid, static_cast<decltype(slope)>(gradient),
             static_cast<const std::remove_pointer_t<decltype(to)>*>(weight), scale, zero,
             static_cast<decltype(to)>(for_weight), for_scale);
  };
  using Wide = float*;
  using Half = uint16_t*;
  using ConstWide = const float*;
  using ConstHalf = const uint16_t*;
  if (weight_wide)
    gradient_wide ? run(ConstWide{}, Wide{}) : run(ConstHalf{}, Wide{});
  else
    gradient_wide ? run(ConstWide{}, Half{}) : run(ConstHalf{}, Half{});
}

}  // extern "C"
