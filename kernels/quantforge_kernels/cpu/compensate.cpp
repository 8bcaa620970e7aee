// Scale search and the error-feedback column loop of the GPTQ family, for CPUs.
//
// Plain C ABI, loaded through ctypes; compensate.py holds the definition in torch that this file
// must equal. Rows are independent, so a thread takes LANES rows at a time and keeps them
// transposed ([column][lane]) in its L2 cache: every operation on a column is then a full-width
// vector operation, and a factor row is read once for all lanes. Columns are quantized in panels of
// PANEL: inside a panel one after the other, behind it by one rank-PANEL update, which loads and
// stores each trailing column once for PANEL multiply-adds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "storable.h"

namespace {

constexpr int LANES = 32;
constexpr int PANEL = 8;

// Sum over a group of importance * (weight - scale * code)^2 for the nearest codes.
inline float grid_error(const float* weight, const float* importance, int64_t width, float scale,
                        float low, float high) {
  const float inverse = 1.0f / scale;
  float error = 0.0f;
#pragma omp simd reduction(+ : error)
  for (int64_t i = 0; i < width; ++i) {
    const float code = std::min(std::max(__builtin_rintf(weight[i] * inverse), low), high);
    const float difference = weight[i] - code * scale;
    error += importance[i] * difference * difference;
  }
  return error;
}

// Least-squares scale for the codes that `scale` gives.
inline float refit(const float* weight, const float* importance, int64_t width, float scale,
                   float low, float high) {
  const float inverse = 1.0f / scale;
  float cross = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : cross, square)
  for (int64_t i = 0; i < width; ++i) {
    const float code = std::min(std::max(__builtin_rintf(weight[i] * inverse), low), high);
    cross += importance[i] * weight[i] * code;
    square += importance[i] * code * code;
  }
  return square > 0.0f ? cross / square : scale;
}

// One vector register's worth of lanes; the compiler splits it where registers are narrower.
typedef float Vector __attribute__((vector_size(64)));
constexpr int VECTORS = LANES / 16;

// Add SIGN times the outer products of a panel's PANEL source columns with the rows of `factor` to
// `COUNT` columns of the latent weights, which stay in registers meanwhile.
template <int SIGN, int COUNT>
inline void update_columns(float* latent, const float (*source)[LANES], const float* factor,
                           int64_t columns) {
  Vector total[COUNT][VECTORS];
  std::memcpy(total, latent, sizeof total);
#pragma GCC unroll 8
  for (int p = 0; p < PANEL; ++p) {
    Vector carried[VECTORS];
    std::memcpy(carried, source[p], sizeof carried);
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) {
      const float coefficient = SIGN * factor[p * columns + k];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) total[k][v] += carried[v] * coefficient;
    }
  }
  std::memcpy(latent, total, sizeof total);
}

// The rank-PANEL update of all columns behind the panel at `start`.
template <int SIGN>
void update_behind(float* latent, const float (*source)[LANES], const float* factor, int64_t start,
                   int64_t columns) {
  constexpr int TILE = 4;
  const float* rows = factor + start * columns;
  int64_t k = start + PANEL;
  for (; k + TILE <= columns; k += TILE)
    update_columns<SIGN, TILE>(latent + k * LANES, source, rows + k, columns);
  for (; k < columns; ++k)
    update_columns<SIGN, 1>(latent + k * LANES, source, rows + k, columns);
}

}  // namespace

extern "C" {

int qf_compensate_abi() { return 1; }

// Best symmetric scale of every group: `factors` times the largest magnitude over 2^(bits-1), both
// signs, each start improved by `refits` least-squares steps.
// weight [rows, columns], importance [columns], scale [rows, columns / width].
void qf_search_scales(const float* weight, const float* importance, int64_t rows, int64_t columns,
                      int64_t width, int bits, const float* factors, int factor_count, int refits,
                      int free_sign, int threads, float* scale) {
  const int64_t groups = columns / width;
  const float low = -static_cast<float>(1 << (bits - 1)), high = -low - 1.0f;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const float* w = weight + row * columns + group * width;
      const float* h = importance + group * width;
      float largest = 0.0f;
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(w[i]));
      float best = 1.0f, best_error = INFINITY;
      if (largest > 0.0f) {
        for (int sign = free_sign ? -1 : 1; sign <= 1; sign += 2) {
          float local = 0.0f, local_error = INFINITY;
          for (int f = 0; f < factor_count; ++f) {
            const float trial = round_to_bfloat16(sign * factors[f] * largest / -low);
            if (trial == 0.0f) continue;
            const float error = grid_error(w, h, width, trial, low, high);
            if (error < local_error) local_error = error, local = trial;
          }
          for (int step = 0; step < refits && local != 0.0f; ++step) {
            const float trial = round_to_bfloat16(refit(w, h, width, local, low, high));
            if (trial == 0.0f || trial == local) break;
            const float error = grid_error(w, h, width, trial, low, high);
            if (error >= local_error) break;
            local_error = error, local = trial;
          }
          if (local != 0.0f && local_error < best_error) best_error = local_error, best = local;
        }
      }
      scale[row * groups + group] = best;
    }
  }
}

// The column loop. `order[j]` is the original index of the j-th column to be quantized; `upper` and
// `mismatch` are in that order, everything else in the original one. `first_value` [rows] is what
// the code of the first column is chosen for. `original` (needed by `mismatch` and `pull`),
// `mismatch`, `zero`, `first_value` and `loss` may be null. `top` is the largest code, `middle` the
// one that means 0 without zero-points. See compensate.py for the recurrence.
void qf_column_loop(const float* weight, const float* original, int64_t rows, int64_t columns,
                    const int64_t* order, const float* upper, const float* mismatch,
                    const float* scale, const float* zero, const float* first_value, int64_t width,
                    float top, float middle, float pull, int threads, uint8_t* codes,
                    double* loss) {
  const int64_t groups = columns / width;
  const int64_t chunks = (rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> latent_store(columns * LANES + 16), original_store;
    if (original) original_store.resize(columns * LANES + 16);
    float* latent = latent_store.data();
    float* fixed = original ? original_store.data() : nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * LANES;
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, rows - first));
      double chunk_loss[LANES] = {};
      float aim[LANES] = {};
      if (first_value) std::copy_n(first_value + first, lanes, aim);
      for (int lane = 0; lane < LANES; ++lane) {
        const bool live = lane < lanes;
        const float* source = weight + (first + lane) * columns;
        for (int64_t j = 0; j < columns; ++j)
          latent[j * LANES + lane] = live ? source[order[j]] : 0.0f;
        if (fixed) {
          const float* kept = original + (first + lane) * columns;
          for (int64_t j = 0; j < columns; ++j)
            fixed[j * LANES + lane] = live ? kept[order[j]] : 0.0f;
        }
      }
      for (int64_t start = 0; start < columns; start += PANEL) {
        const int panel = static_cast<int>(std::min<int64_t>(PANEL, columns - start));
        float error[PANEL][LANES], carried[PANEL][LANES];
        for (int p = 0; p < panel; ++p) {
          const int64_t j = start + p, column = order[j], group = column / width;
          const float* factor = upper + j * columns;
          float* w = latent + j * LANES;
          float s[LANES], z[LANES];
          for (int lane = 0; lane < LANES; ++lane) {
            const int64_t at = (first + std::min(lane, lanes - 1)) * groups + group;
            s[lane] = scale[at];
            z[lane] = zero ? zero[at] : middle;
          }
          const float inverse_pivot = 1.0f / factor[j];
          const float* keep = fixed ? fixed + j * LANES : w;
          const float* wanted = j == 0 && first_value ? aim : w;
          const float shrink = j > 0 ? pull : 0.0f;
          uint8_t chosen[LANES];
#pragma omp simd
          for (int lane = 0; lane < LANES; ++lane) {
            const float value = w[lane] - shrink * (w[lane] - keep[lane]);
            w[lane] = value;
            const float raw = __builtin_rintf(wanted[lane] / s[lane] + z[lane]);
            const float code = std::min(std::max(raw, 0.0f), top);
            const float residual = value - (code - z[lane]) * s[lane];
            error[p][lane] = (residual - pull * (value - keep[lane])) * inverse_pivot;
            carried[p][lane] = keep[lane];
            chosen[lane] = static_cast<uint8_t>(code);
            const float scaled = residual * inverse_pivot;
            chunk_loss[lane] += static_cast<double>(scaled) * scaled;
          }
          for (int lane = 0; lane < lanes; ++lane)
            codes[(first + lane) * columns + column] = chosen[lane];
          for (int q = p + 1; q < panel; ++q) {
            float* next = latent + (start + q) * LANES;
            const float u = factor[start + q];
            const float m = mismatch ? mismatch[j * columns + start + q] : 0.0f;
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane)
              next[lane] += carried[p][lane] * m - error[p][lane] * u;
          }
        }
        // Columns are left only behind a full panel.
        if (start + panel < columns) {
          update_behind<-1>(latent, error, upper, start, columns);
          if (mismatch) update_behind<1>(latent, carried, mismatch, start, columns);
        }
      }
      if (loss)
        for (int lane = 0; lane < lanes; ++lane) loss[first + lane] = chunk_loss[lane];
    }
  }
}

}  // extern "C"
