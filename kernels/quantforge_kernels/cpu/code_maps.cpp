// What surrounds convolutions on codes: rounding to a grid, decoding, residual additions, the largest
// of a window. code_maps.py holds the definitions. Arrays are flat, or images, channels last.

#include <omp.h>

#include "requantize.h"

using namespace quantforge;

namespace {

constexpr int64_t PIECE = 1 << 14;   // numbers a task
constexpr int64_t ENOUGH = 1 << 18;  // numbers: a parallel loop of less does not pay

Integers codes_at(const uint8_t* from, int64_t index) {
  return extend(load<Bytes>(from + index));
}

// function(index) of every sixteen numbers; the last ones of an array are taken again, so `function`
// must not read what it writes.
template <typename Function>
void each_vector(int64_t count, int threads, Function function) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > ENOUGH)
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t last = std::min(first + PIECE, count);
    int64_t index = first;
    for (; index + LANES <= last; index += LANES) function(index);
    if (index < last) function(count - LANES);
  }
}

// Codes of `count` places of [channels, places] numbers, as [places, channels].
void channels_to_codes(const float* x, int64_t channels, int64_t places, int64_t count,
                       const Epilogue& to, uint8_t* codes) {
  const float low = static_cast<float>(-to.zero), high = static_cast<float>(to.most - to.zero);
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t place = 0; place < count; ++place) {
      float value = x[channel * places + place] * to.inverse;
      value = value < low ? low : value;
      value = value > high ? high : value;
      const int code = static_cast<int>(__builtin_rintf(value)) + to.zero;
      codes[place * channels + channel] = static_cast<uint8_t>(code);
    }
}

// The same of three channels, 64 places at a time.
void colours_to_codes(const float* x, int64_t places, int64_t count, const Epilogue& to,
                      uint8_t* codes) {
  constexpr int64_t AT_ONCE = 64;
  int64_t place = 0;
  for (; place + AT_ONCE <= count; place += AT_ONCE) {
    uint8_t apart[3][AT_ONCE];
    for (int64_t channel = 0; channel < 3; ++channel)
      for (int64_t at = 0; at < AT_ONCE; at += LANES)
        store_bytes(apart[channel] + at,
                    codes_of(load<Floats>(x + channel * places + place + at), to), LANES);
    uint8_t* target = codes + 3 * place;
    for (int64_t at = 0; at < AT_ONCE; ++at) {
      target[3 * at] = apart[0][at];
      target[3 * at + 1] = apart[1][at];
      target[3 * at + 2] = apart[2][at];
    }
  }
  channels_to_codes(x + place, 3, places, count - place, to, codes + 3 * place);
}

}  // namespace

// In every function `count` is at least 16.
extern "C" {

// codes = clamp(round(x · inverse) + zero, 0, top)
void qf_to_codes(const float* x, int64_t count, float inverse, int zero, int top, int threads,
                 uint8_t* codes) {
  Epilogue to{};
  to.inverse = inverse;
  to.zero = zero;
  to.least = 0;
  to.most = top;
  each_vector(count, threads, [&](int64_t index) {
    store_bytes(codes + index, codes_of(load<Floats>(x + index), to), LANES);
  });
}

// The same of images [batch, channels, places], whose codes become [batch, places, channels].
void qf_to_last(const float* x, int64_t batch, int64_t channels, int64_t places, float inverse,
                int zero, int top, int threads, uint8_t* codes) {
  Epilogue to{};
  to.inverse = inverse;
  to.zero = zero;
  to.most = top;
  const int64_t pieces = (places + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (batch * pieces > 1)
  for (int64_t task = 0; task < batch * pieces; ++task) {
    const int64_t picture = task / pieces, first = task % pieces * PIECE;
    const int64_t start = picture * channels * places;
    const float* from = x + start + first;
    uint8_t* target = codes + start + first * channels;
    const int64_t count = std::min(PIECE, places - first);
    channels == 3 ? colours_to_codes(from, places, count, to, target)
                  : channels_to_codes(from, channels, places, count, to, target);
  }
}

// x = (code - zero) · scale
void qf_from_codes(const uint8_t* codes, int64_t count, float scale, int zero, int threads,
                   float* x) {
  each_vector(count, threads, [&](int64_t index) {
    store(x + index, to_floats(codes_at(codes, index) - zero) * scale);
  });
}

// codes = clamp(round((a - a_zero) · a_scale + (b - b_zero) · b_scale) + zero, least, most), with
// the output's scale in both.
void qf_add_codes(const uint8_t* a, const uint8_t* b, int64_t count, const float* scales,
                  const int32_t* zeros, const int32_t* limits, int threads, uint8_t* codes) {
  const int32_t zero = zeros[2];
  const float low = static_cast<float>(limits[0] - zero);
  const float high = static_cast<float>(limits[1] - zero);
  each_vector(count, threads, [&](int64_t index) {
    const Floats first = to_floats(codes_at(a, index) - zeros[0]) * scales[0];
    const Floats second = to_floats(codes_at(b, index) - zeros[1]) * scales[1];
    store_bytes(codes + index, nearest(clamped(first + second, low, high), zero), LANES);
  });
}

// codes = clamp(((a - a_zero) · a_multiplier + (b - b_zero) · b_multiplier + 2^(shift - 1)) >> shift
// + zero, least, most)
void qf_add_dyadic(const uint8_t* a, const uint8_t* b, int64_t count, const int64_t* multipliers,
                   const int32_t* zeros, const int32_t* limits, int shift, int threads,
                   uint8_t* codes) {
  const int64_t half = int64_t{1} << (shift - 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (count > ENOUGH)
  for (int64_t index = 0; index < count; ++index) {
    const int64_t first = (a[index] - zeros[0]) * multipliers[0];
    const int64_t sum = first + (b[index] - zeros[1]) * multipliers[1];
    const int64_t code = ((sum + half) >> shift) + zeros[2];
    const int64_t least = limits[0], most = limits[1];
    codes[index] = static_cast<uint8_t>(std::min(std::max(code, least), most));
  }
}

// The largest code of every window; `sizes` are batch, height, width, channels, out height, out
// width, and kernel, stride, padding and dilation down and across.
void qf_largest(const uint8_t* x, const int64_t* sizes, int threads, uint8_t* out) {
  const int64_t height = sizes[1], width = sizes[2], channels = sizes[3];
  const int64_t out_height = sizes[4], out_width = sizes[5];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < sizes[0] * out_height; ++row) {
    const uint8_t* image = x + row / out_height * height * width * channels;
    const int64_t top = row % out_height * sizes[8] - sizes[10];
    for (int64_t across = 0; across < out_width; ++across) {
      uint8_t* to = out + (row * out_width + across) * channels;
      std::memset(to, 0, channels);
      const int64_t left = across * sizes[9] - sizes[11];
      for (int64_t i = 0; i < sizes[6]; ++i)
        for (int64_t j = 0; j < sizes[7]; ++j) {
          const int64_t y = top + i * sizes[12], z = left + j * sizes[13];
          if (y < 0 || y >= height || z < 0 || z >= width) continue;
          const uint8_t* from = image + (y * width + z) * channels;
          for (int64_t c = 0; c < channels; ++c) to[c] = std::max(to[c], from[c]);
        }
    }
  }
}

}  // extern "C"
