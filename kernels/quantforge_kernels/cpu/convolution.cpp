// C ABI of convolution on activation codes; see codes.h for the layout, implicit.h and depthwise.h
// for the two ways it is computed. integer_convolution.py holds the definition.

#include <omp.h>

#include <numeric>

#include "depthwise.h"

using namespace quantforge;

namespace {

constexpr int64_t CHUNK_BYTES = 1 << 19;  // of gathered rows: half of a core's second cache
constexpr int64_t ENOUGH = 64;             // positions a thread, to pay for decoding the weight
constexpr int64_t PIECES = 4;              // of a thread's share: a core that is busy takes fewer

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

struct Work {
  const uint8_t* x;
  const Places& places;
  const Run* runs;
  const IntegerWeight& weight;
  const Epilogue& to;
  Panels panels;

  int64_t stride() const { return places.direct ? places.channels : places.row_bytes; }
  int64_t chunk(int64_t positions) const {
    return std::min(positions, std::max<int64_t>(64, CHUNK_BYTES / stride()));
  }
};

// Decodes a panel of a part; `held` says which one `space` has.
void hold_panel(const Work& work, int64_t part, int64_t panel, Words* space, int64_t& held) {
  const int64_t index = part * work.panels.count + panel;
  if (held == index) return;
  const int64_t tile = work.panels.first(panel), tiles = work.panels.first(panel + 1) - tile;
  for (int64_t v = 0; v < tiles; ++v)
    decode_any(work.weight, part * work.panels.tiles + tile + v, space + v, tiles);
  held = index;
}

// Positions [first, last) of one panel; `rows` is where position `first` starts.
void panel_product(const Work& work, int64_t part, int64_t panel, const Words* space,
                   const uint8_t* rows, int64_t first, int64_t last) {
  const int64_t tile = work.panels.first(panel), tiles = work.panels.first(panel + 1) - tile;
  const int64_t channel = tile * LANES, out_part = work.places.out_part;
  const Target target{part * work.panels.tiles + tile, part * out_part + channel,
                      out_part - channel};
  any_rows(tiles, work.weight, Rows{rows, work.stride()}, space, work.places.zero, work.to, target,
           first, last - first);
}

// Memory for gathered rows; what no run covers counts as padding.
uint8_t* room_for_rows(const Work& work, Space<uint8_t>& space, int64_t count) {
  if (work.places.direct) return nullptr;
  uint8_t* rows = space.start(count * work.stride());
  std::memset(rows, work.places.zero, count * work.stride());
  return rows;
}

// Pieces of the positions by threads that work alone and take the next one when they are done.
void alone(const Work& work, Words* panel_space) {
  static thread_local Space<uint8_t> gathered;
  const int64_t team = omp_get_num_threads(), positions = work.places.positions();
  const int64_t pieces = team == 1 ? 1 : PIECES * team;
  const int64_t chunk = work.chunk(std::max((positions + pieces - 1) / pieces, ENOUGH));
  uint8_t* rows = room_for_rows(work, gathered, chunk);
  int64_t held = -1;
#pragma omp for schedule(dynamic) collapse(2) nowait
  for (int64_t part = 0; part < work.places.parts; ++part)
    for (int64_t from = 0; from < positions; from += chunk) {
      const int64_t until = std::min(from + chunk, positions);
      if (rows)
        gather(work.places, work.runs, work.x, from, until, part * work.places.in_part, rows);
      const uint8_t* start = rows ? rows : work.x + from * work.stride();
      for (int64_t panel = 0; panel < work.panels.count; ++panel) {
        hold_panel(work, part, panel, panel_space, held);
        panel_product(work, part, panel, panel_space, start, from, until);
      }
    }
}

// All positions by all threads of a team: they share the rows, and each has its own panels, so that
// none is decoded twice unless there are fewer panels than threads.
void together(const Work& work, uint8_t* rows, Words* panel_space) {
  const int64_t team = omp_get_num_threads(), positions = work.places.positions();
  const int64_t shares = team / std::gcd(work.panels.count, team), stride = work.stride();
  int64_t held = -1;
  for (int64_t part = 0; part < work.places.parts; ++part) {
    if (rows) {
#pragma omp for schedule(static)
      for (int64_t share = 0; share < team; ++share) {
        const int64_t from = share * positions / team, until = (share + 1) * positions / team;
        gather(work.places, work.runs, work.x, from, until, part * work.places.in_part,
               rows + from * stride);
      }
    }
    const uint8_t* start = rows ? rows : work.x;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < work.panels.count * shares; ++task) {
      const int64_t panel = task / shares, share = task % shares;
      const int64_t from = share * positions / shares, until = (share + 1) * positions / shares;
      hold_panel(work, part, panel, panel_space, held);
      panel_product(work, part, panel, panel_space, start + from * stride, from, until);
    }
  }
}

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

// out = x convolved with the weight. Threads take positions of their own where there are many, and
// output channels where there are few.
void qf_convolve(const uint8_t* x, const int64_t* place_numbers, const int64_t* run_numbers,
                 const int64_t* weight_numbers, const void* const* weight_arrays,
                 const int64_t* numbers, const float* floats, const void* const* arrays,
                 int threads, void* out) {
  const Places places = places_of(place_numbers);
  const IntegerWeight weight = weight_of(weight_numbers, weight_arrays);
  const Epilogue to = epilogue_of(numbers, floats, arrays, out);
  const Work work{x,  places, reinterpret_cast<const Run*>(run_numbers), weight,
                  to, Panels(places.out_part)};
  const int64_t positions = places.positions();
  const bool many = positions >= ENOUGH * threads;
  static thread_local Space<uint8_t> gathered;
  uint8_t* rows = many ? nullptr : room_for_rows(work, gathered, positions);
  const int64_t a_panel = weight.units * SLOTS * MOST_TILES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space<Words> decoded;
    Words* panel_space = decoded.start(a_panel);
    many ? alone(work, panel_space) : together(work, rows, panel_space);
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
  const int64_t shared = kernel.shared_rows(places.stride_down);
  const int64_t a_picture = (places.out_height + shared - 1) / shared;
  const int64_t tasks = places.batch * a_picture;  // of a block
  const int64_t reach = (kernel.kernel_width - 1) * kernel.dilation_across + 1;
  const int64_t needed = (places.out_width - 1) * places.stride_across + reach;
  const int64_t a_weight = weight.units * SLOTS, slots = kernel.slots();
  const int64_t piece = std::max<int64_t>(1, blocks * tasks / (PIECES * threads));
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space<Words> space;
    Words* decoded = space.start(a_weight + shared * slots + needed * kernel.row_groups() * VECTORS);
    Words* weights = decoded + a_weight;
    int64_t held = -1;
#pragma omp for schedule(dynamic, piece) nowait
    for (int64_t task = 0; task < blocks * tasks; ++task) {
      const int64_t block = task / tasks, part = task % tasks;
      if (held != block) {
        decode_any(weight, block, decoded, 1);
        for (int64_t row = 0; row < shared; ++row)
          move_down(kernel, decoded, row * places.stride_down, weights + row * slots);
        held = block;
      }
      const int64_t down = part % a_picture * shared;
      depthwise_rows(places, kernel, x, weight, weights, to, part / a_picture, down,
                     std::min(shared, places.out_height - down), block, weights + shared * slots);
    }
  }
}

}  // extern "C"
