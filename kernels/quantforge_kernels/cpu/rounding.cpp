// One step of learned rounding, in one pass over a layer's latents.
//
// Plain C ABI, loaded through ctypes; rounding.py holds the definition. A layer has as many latents
// as weights and a step does little with each, so what counts is how often they go through memory:
// once to make the weight, once to take its gradient in and move on. Rows are independent.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float code_of(float latent, float top) {
  return std::min(std::max(__builtin_rintf(latent), 0.0f), top);
}

// Nearest bfloat16, ties to even; finite values.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float as_float(float value) { return value; }
inline float as_float(uint16_t value) { return from_bfloat16(value); }
inline void store(float value, float* out) { *out = value; }
inline void store(float value, uint16_t* out) { *out = to_bfloat16(value); }

inline float sign_of(float value) { return static_cast<float>((value > 0.0f) - (value < 0.0f)); }

template <typename T>
void make_weight(const float* latent, float scale, float centre, float top, int64_t width, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k)
    store((code_of(latent[k], top) - centre) * scale, out + k);
}

struct Step {
  float latent, scale;  // sizes
  float keep, take;     // of the running means: their past, and what is new
};

// One group: its latents and its scale move against the signs of the running means.
template <typename T>
void move_group(const T* gradient, const Step& step, float centre, float top, int64_t width,
                float* latent, float* latent_mean, float* scale, float* scale_mean) {
  const float size = *scale;
  float for_scale = 0.0f;
#pragma omp simd reduction(+ : for_scale)
  for (int64_t k = 0; k < width; ++k) {
    const float slope = as_float(gradient[k]), at = latent[k];
    for_scale += slope * (code_of(at, top) - centre);
    const bool inside = at > -0.5f && at < top + 0.5f;
    const float own = inside ? slope * size : 0.0f;
    const float mean = step.keep * latent_mean[k] + step.take * own;
    latent_mean[k] = mean;
    latent[k] = at - step.latent * sign_of(mean);
  }
  const float mean = step.keep * *scale_mean + step.take * for_scale;
  *scale_mean = mean;
  *scale = size - step.scale * sign_of(mean) * std::fabs(size);
}

struct Layer {
  int64_t rows, groups, width;
  float top;
  const float* centres;  // one a group, or one for all
  int64_t centre_stride;

  float centre(int64_t group) const { return centres[group * centre_stride]; }
};

}  // namespace

extern "C" {

// out [rows, groups * width] = (clamp(round(latent), 0, top) - centre) * scale; float32 if `wide`,
// else bfloat16.
void qf_rounded_weight(const float* latent, const float* scale, const float* centres,
                       int64_t centre_stride, float top, int64_t rows, int64_t groups,
                       int64_t width, int wide, int threads, void* out) {
  const Layer layer{rows, groups, width, top, centres, centre_stride};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < rows * groups; ++group) {
    const float* from = latent + group * width;
    const float centre = layer.centre(group), size = scale[group];
    if (wide)
      make_weight(from, size, centre, top, width, static_cast<float*>(out) + group * width);
    else
      make_weight(from, size, centre, top, width, static_cast<uint16_t*>(out) + group * width);
  }
}

// Takes the gradient of the weight in, and moves latents and scales; means are zero before the
// first step, for which `keep` is 0 and `take` 1.
void qf_rounding_step(const void* gradient, int wide, const float* centres, int64_t centre_stride,
                      float top, int64_t rows, int64_t groups, int64_t width, float latent_step,
                      float scale_step, float keep, float take, int threads, float* latent,
                      float* latent_mean, float* scale, float* scale_mean) {
  const Layer layer{rows, groups, width, top, centres, centre_stride};
  const Step step{latent_step, scale_step, keep, take};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < rows * groups; ++group) {
    const int64_t at = group * width;
    if (wide)
      move_group(static_cast<const float*>(gradient) + at, step, layer.centre(group), top, width,
                 latent + at, latent_mean + at, scale + group, scale_mean + group);
    else
      move_group(static_cast<const uint16_t*>(gradient) + at, step, layer.centre(group), top, width,
                 latent + at, latent_mean + at, scale + group, scale_mean + group);
  }
}

}  // extern "C"
