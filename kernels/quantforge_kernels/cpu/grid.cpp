// Search of asymmetric grids, (code - zero) * scale, for CPUs.
//
// Plain C ABI, loaded through ctypes; grid.py holds the definition in torch that this file must
// equal, and says how the search goes. Groups are independent; everything on one group is a vector
// loop over its weights.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "storable.h"

namespace {

struct Group {
  const float* weight;
  const float* importance;
  int64_t width;
  float low, high;  // least and greatest weight; with an integer zero, 0 is between them
  float top;        // largest code
  bool whole;       // the zero is an integer code

  float storable_zero(float zero) const {
    return whole ? std::min(std::max(__builtin_rintf(zero), 0.0f), top) : round_to_float16(zero);
  }
};

// The best grid so far and its error.
struct Best {
  float scale, zero, error;
};

inline float nearest_code(float weight, float inverse, float zero, float top) {
  return std::min(std::max(__builtin_rintf(weight * inverse + zero), 0.0f), top);
}

float grid_error(const Group& g, float scale, float zero) {
  const float inverse = 1.0f / scale;
  float error = 0.0f;
#pragma omp simd reduction(+ : error)
  for (int64_t i = 0; i < g.width; ++i) {
    const float code = nearest_code(g.weight[i], inverse, zero, g.top);
    const float difference = g.weight[i] - (code - zero) * scale;
    error += g.importance[i] * difference * difference;
  }
  return error;
}

// Takes the grid if it is storable and better; tells whether it was.
bool consider(const Group& g, float scale, float zero, Best& best) {
  if (!(scale >= FLT_MIN) || std::fabs(zero) > 65000.0f) return false;
  const float error = grid_error(g, scale, zero);
  if (!(error < best.error)) return false;
  best = {scale, zero, error};
  return true;
}

// One least-squares step: zero and scale for the codes of `best`, the scale again for the zero as
// it is stored. Sums are centred, so that they do not cancel where all weights have one sign.
bool refit(const Group& g, Best& best) {
  const float inverse = 1.0f / best.scale, zero = best.zero;
  const float centre = 0.5f * g.top, middle = 0.5f * (g.low + g.high);
  float h = 0.0f, hu = 0.0f, huu = 0.0f, hw = 0.0f, huw = 0.0f;
#pragma omp simd reduction(+ : h, hu, huu, hw, huw)
  for (int64_t i = 0; i < g.width; ++i) {
    const float u = nearest_code(g.weight[i], inverse, zero, g.top) - centre;
    const float w = g.weight[i] - middle, hi = g.importance[i];
    h += hi;
    hu += hi * u;
    huu += hi * u * u;
    hw += hi * w;
    huw += hi * u * w;
  }
  const float determinant = h * huu - hu * hu;
  const float slope = (h * huw - hu * hw) / std::max(determinant, FLT_MIN);
  if (!(determinant > 1e-6f * h * huu) || !(slope >= FLT_MIN)) return false;
  const float offset = middle + (hw - slope * hu) / h;
  const float stored = g.storable_zero(centre - offset / slope);
  const float shift = centre - stored;
  const float cross = huw + middle * hu + shift * (hw + middle * h);
  const float square = huu + 2.0f * shift * hu + shift * shift * h;
  if (!(square > 0.0f)) return false;
  return consider(g, round_to_bfloat16(cross / square), stored, best);
}

// Pattern search around `best`: scales a step up and down, zeros a step up and down of where the
// grid keeps its centre; steps halve from round to round.
void polish(const Group& g, int rounds, float scale_step, float zero_step, Best& best) {
  const float centre = 0.5f * g.top;
  for (int round = 0; round < rounds; ++round, scale_step *= 0.5f, zero_step *= 0.5f) {
    const Best from = best;
    for (int i = -1; i <= 1; ++i) {
      const float scale = round_to_bfloat16(from.scale * (1.0f + static_cast<float>(i) * scale_step));
      const float kept = centre - (centre - from.zero) * (from.scale / scale);
      for (int k = -1; k <= 1; ++k) {
        const float move = static_cast<float>(k) * (g.whole ? 1.0f : zero_step);
        consider(g, scale, g.storable_zero(kept + move), best);
      }
    }
  }
}

// Best grid of one group among `factors` times its range, each with `zeros` zero-points and then
// improved by up to `refits` least-squares steps; the best of all is polished.
Best search(const Group& g, const float* factors, int factor_count, int zeros, int refits,
            int rounds, float scale_step, float zero_step) {
  const float below = std::min(g.low, 0.0f), above = std::max(g.high, 0.0f);
  Best best = {1.0f, 0.0f, FLT_MAX};
  const float covering = round_to_bfloat16((above - below) / g.top);
  if (!(covering >= FLT_MIN)) return best;
  consider(g, covering, g.storable_zero(-below / covering), best);
  for (int f = 0; f < factor_count; ++f) {
    const float scale = round_to_bfloat16(factors[f] * (g.high - g.low) / g.top);
    if (!(scale >= FLT_MIN)) continue;
    const float at_low = -g.low / scale, at_high = g.top - g.high / scale;
    float first = std::min(at_low, at_high) - 0.5f, last = std::max(at_low, at_high) + 0.5f;
    if (g.whole) {
      first = std::min(std::max(first, 0.0f), g.top);
      last = std::min(std::max(last, 0.0f), g.top);
    }
    const float step = (last - first) / static_cast<float>(zeros - 1);
    Best local = {scale, 0.0f, FLT_MAX};
    float previous = FLT_MAX;
    for (int k = 0; k < zeros; ++k) {
      const float zero = g.storable_zero(first + static_cast<float>(k) * step);
      if (zero == previous) continue;
      previous = zero;
      consider(g, scale, zero, local);
    }
    for (int r = 0; r < refits && local.error < FLT_MAX && refit(g, local); ++r) {
    }
    if (local.error < best.error) best = local;
  }
  polish(g, rounds, scale_step, zero_step, best);
  return best;
}

}  // namespace

extern "C" {

int qf_grid_abi() { return 1; }

// weight [rows, columns], importance [columns]; scale and zero [rows, columns / width].
void qf_search_grid(const float* weight, const float* importance, int64_t rows, int64_t columns,
                    int64_t width, int bits, int whole, const float* factors, int factor_count,
                    int zeros, int refits, int rounds, float scale_step, float zero_step,
                    int threads, float* scale, float* zero) {
  const int64_t groups = columns / width;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t at = 0; at < rows * groups; ++at) {
    const int64_t row = at / groups, group = at % groups;
    Group g = {weight + row * columns + group * width, importance + group * width, width, 0.0f,
               0.0f, static_cast<float>((1 << bits) - 1), whole != 0};
    g.low = g.high = g.weight[0];
    for (int64_t i = 1; i < width; ++i) {
      g.low = std::min(g.low, g.weight[i]);
      g.high = std::max(g.high, g.weight[i]);
    }
    if (g.whole) g.low = std::min(g.low, 0.0f), g.high = std::max(g.high, 0.0f);
    const Best best =
        search(g, factors, factor_count, zeros, refits, rounds, scale_step, zero_step);
    scale[at] = best.scale;
    zero[at] = best.zero;
  }
}

}  // extern "C"
