// C ABI of convolution on activation codes; see codes.h for the layout, implicit.h and depthwise.h
// for the two ways it is computed. integer_convolution.py holds the definition.

#include <omp.h>

#include <numeric>

#include "depthwise.h"

using namespace quantforge;

namespace {

constexpr int64_t CHUNK_BYTES = 1 << 19;  // of gathered rows: half of a core's second cache

Places places_of(const int64_t* n) {
  return Places{n[0], n[1], n[2],  n[3],  n[4],  n[5],  n[6],     n[7],        n[8],
                n[9], n[10], n[11], n[12], n[13], n[14], n[15] != 0, static_cast<int32_t>(n[16])};
}

IntegerWeight weight_of(const int64_t* n, const void* const* arrays) {
  return IntegerWeight{n[0], n[1], n[2], static_cast<int>(n[3]),
                       static_cast<const uint32_t*>(arrays[0]),
                       static_cast<const uint8_t*>(arrays[1]),
                       static_cast<const int32_t*>(arrays[2]),
                       static_cast<const int32_t*>(arrays[3]),
                       static_cast<const float*>(arrays[4])};
}

// `numbers` are the kind of result, zero, least and most code and the stride; `floats` are inverse,
// low and high.
Epilogue epilogue_of(const int64_t* numbers, const float* floats, const void* const* arrays,
                     void* out) {
  return Epilogue{static_cast<Result>(numbers[0]),
                  static_cast<const float*>(arrays[0]),
                  floats[0],
                  static_cast<const int32_t*>(arrays[1]),
                  static_cast<const int32_t*>(arrays[2]),
                  static_cast<const int32_t*>(arrays[3]),
                  floats[1],
                  floats[2],
                  static_cast<int32_t>(numbers[1]),
                  static_cast<int32_t>(numbers[2]),
                  static_cast<int32_t>(numbers[3]),
                  out,
                  numbers[4]};
}

// How a part's output channels are cut into panels of tiles.
struct Panels {
  int64_t tiles, count;
  explicit Panels(int64_t channels) : tiles((channels + LANES - 1) / LANES) {
    count = (tiles + MOST_TILES - 1) / MOST_TILES;
  }
  int64_t first(int64_t panel) const { return panel * tiles / count; }
};

}  // namespace

extern "C" {

int qf_convolution_instructions() {
#if defined(__AVX512VNNI__)
  return 3;
#elif defined(__AVX2__)
  return 2;
#else
  return 1;
#endif
}

// out = x convolved with the weight. All threads gather the rows of a chunk of positions, then take
// pairs of a panel and a share of the chunk.
void qf_convolve(const uint8_t* x, const int64_t* place_numbers, const int64_t* run_numbers,
                 const int64_t* weight_numbers, const void* const* weight_arrays,
                 const int64_t* numbers, const float* floats, const void* const* arrays,
                 int threads, void* out) {
  const Places places = places_of(place_numbers);
  const Run* runs = reinterpret_cast<const Run*>(run_numbers);
  const IntegerWeight weight = weight_of(weight_numbers, weight_arrays);
  const Epilogue to = epilogue_of(numbers, floats, arrays, out);
  const Panels panels(places.out_part);
  const int64_t positions = places.positions();
  const int64_t stride = places.direct ? places.channels : places.row_bytes;
  const int64_t chunk = std::min(positions, std::max<int64_t>(64, CHUNK_BYTES / stride));
  static thread_local Space<uint8_t> gathered;
  uint8_t* rows = nullptr;
  if (!places.direct) {
    rows = gathered.start(chunk * stride);
    std::memset(rows, places.zero, chunk * stride);  // what no run covers counts as padding
  }
  const int64_t a_panel = weight.units * SLOTS * MOST_TILES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space<Words> decoded;
    Words* panel_space = decoded.start(a_panel);
    const int64_t team = omp_get_num_threads();
    const int64_t shares = team / std::gcd(panels.count, team);
    for (int64_t part = 0; part < places.parts; ++part) {
      int64_t held = -1;
      for (int64_t first = 0; first < positions; first += chunk) {
        const int64_t count = std::min(chunk, positions - first);
        if (!places.direct) {
#pragma omp for schedule(static)
          for (int64_t share = 0; share < team; ++share) {
            const int64_t from = share * count / team, until = (share + 1) * count / team;
            gather(places, runs, x, first + from, first + until, part * places.in_part,
                   rows + from * stride);
          }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < panels.count * shares; ++task) {
          const int64_t panel = task / shares, share = task % shares;
          const int64_t from = share * count / shares, until = (share + 1) * count / shares;
          const int64_t tile = panels.first(panel), tiles = panels.first(panel + 1) - tile;
          const int64_t own = part * panels.tiles + tile;
          if (held != panel) {
            for (int64_t v = 0; v < tiles; ++v) decode_any(weight, own + v, panel_space + v, tiles);
            held = panel;
          }
          const uint8_t* start = places.direct ? x + first * stride : rows;
          const Rows some{start + from * stride, stride};
          const int64_t channel = tile * LANES;
          const Target target{own, part * places.out_part + channel, places.out_part - channel};
          any_rows(tiles, weight, some, panel_space, places.zero, to, target, first + from,
                   until - from);
        }
      }
    }
  }
}

// The same where every channel has its own kernel of one row for itself.
void qf_depthwise(const uint8_t* x, const int64_t* place_numbers, const int64_t* kernel_numbers,
                  const int64_t* weight_numbers, const void* const* weight_arrays,
                  const int64_t* numbers, const float* floats, const void* const* arrays,
                  int threads, void* out) {
  const Places places = places_of(place_numbers);
  const Depthwise kernel{kernel_numbers[0], kernel_numbers[1], kernel_numbers[2],
                         kernel_numbers[3]};
  const IntegerWeight weight = weight_of(weight_numbers, weight_arrays);
  const Epilogue to = epilogue_of(numbers, floats, arrays, out);
  const int64_t blocks = (places.channels + BLOCK - 1) / BLOCK;
  const int64_t rows = places.batch * places.out_height;
  const int64_t reach = (kernel.kernel_width - 1) * kernel.dilation_across + 1;
  const int64_t needed = (places.out_width - 1) * places.stride_across + reach;
  const int64_t a_weight = weight.units * SLOTS;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space<Words> space;
    Words* weights = space.start(a_weight + needed * kernel.row_groups() * VECTORS);
    int64_t held = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * rows; ++task) {
      const int64_t block = task / rows, row = task % rows;
      if (held != block) {
        decode_any(weight, block, weights, 1);
        held = block;
      }
      depthwise_row(places, kernel, x, weight, weights, to, row, block, weights + a_weight);
    }
  }
}

}  // extern "C"
