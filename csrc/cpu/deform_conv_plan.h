// How deform_conv2d is cut into pieces on the CPU. No result depends on the number of threads: backward, the shape of
// the call alone decides; forward, every output has a sum of its own, wherever the cuts are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "deform_conv.h"

namespace dcnv2::cpu {

// A thread works on a tile of output pixels, about square so that its samples lie close together, and on a chunk of
// columns at a time: so many channels at so many taps. Backward, fewer channels make more tasks.
constexpr int64_t tile = 112, tile_width = 16, chunk_taps = 9, forward_channels = 64, backward_channels = 32;
constexpr int64_t forward_width = forward_channels * chunk_taps, backward_width = backward_channels * chunk_taps;
// From one row of columns to the next; more than a chunk, against conflicts in the cache
constexpr int64_t forward_stride = forward_width + 16, backward_stride = backward_width + 16;

// Two bfloat16 that are neighbours along a sum, multiplied and added by one instruction
using Bfloat16Pair = uint32_t;

// Calls fn with each of `flags` as a std::bool_constant.
template <typename fn_t>
void choose(const fn_t& fn) {
  fn();
}
template <typename fn_t, typename... flags_t>
void choose(const fn_t& fn, bool first, flags_t... flags) {
  if (first) {
    choose([&](auto... rest) { fn(std::true_type(), rest...); }, flags...);
  } else {
    choose([&](auto... rest) { fn(std::false_type(), rest...); }, flags...);
  }
}

// A weight [O, C / groups, kh, kw] of either layout
template <typename value_t>
struct Weight {
  value_t* data;
  int64_t output, channel, tap;  // strides
};

// Channels that share their convolution group and their offset group
struct Block {
  int64_t channel, channels;  // first, number
  int64_t group, offset_group;
  int64_t channel_in_group, output;  // first input channel in the weight, first output channel of the group
};

inline std::vector<Block> blocks_of(const DeformConvShape& s, int64_t most) {
  const int64_t per_group = s.in_channels / s.groups, per_offset_group = s.in_channels / s.offset_groups;
  std::vector<Block> blocks;
  for (int64_t c = 0, end; c < s.in_channels; c = end) {
    const int64_t group = c / per_group, offset_group = c / per_offset_group;
    end = std::min({c + most, (group + 1) * per_group, (offset_group + 1) * per_offset_group});
    blocks.push_back({c, end - c, group, offset_group, c - group * per_group, group * (s.out_channels / s.groups)});
  }
  return blocks;
}

// A rectangle of one image's output pixels
struct Tile {
  int64_t image, row, column, rows, columns;

  int64_t pixels() const { return rows * columns; }
};

// Rows of one image's output
struct Part {
  int64_t image, begin, end;
  int64_t before;  // pixels of the strip's other parts before it
  bool whole;      // all rows of the image
};

// The order in which tiles take output pixels: column after column of tile_width, and each of them row by row
struct TileRows {
  int64_t height, width, columns;

  explicit TileRows(const DeformConvShape& s)
      : height(s.out_height), width(s.out_width), columns(ceil_div(width, tile_width)) {}
  // The row that holds a pixel, both counted over all images in this order
  int64_t row_at(int64_t pixel) const {
    const int64_t image = pixel / (height * width), rest = pixel % (height * width);
    const int64_t whole = width / tile_width * height;  // rows of full width
    const int64_t row =
        rest < whole * tile_width ? rest / tile_width : whole + (rest - whole * tile_width) / (width % tile_width);
    return image * columns * height + row;
  }
  // The tile that begins with row number `at` of those that lie in `part`, and has no row from number `end` on
  Tile tile_at(const Part& part, int64_t at, int64_t end) const {
    const int64_t rows = part.end - part.begin, row = at % rows, column = at / rows * tile_width;
    const int64_t wide = std::min(tile_width, width - column);
    return {part.image, part.begin + row, column, std::min({tile / wide, end - at, rows - row}), wide};
  }
};

// Output rows of the whole batch that a task of the backward pass covers, for one block
struct Strip {
  std::vector<Part> parts;
  int64_t pixels = 0;
};

// As many strips as give 16 tasks, unless their pixels become too few.
inline std::vector<Strip> strips_of(const DeformConvShape& s, int64_t blocks) {
  const int64_t rows = s.batch * s.out_height, enough = rows * s.out_width / (4 * tile);
  const int64_t count = std::max<int64_t>(std::min({ceil_div(16, blocks), rows, enough}), 1);
  std::vector<Strip> strips(count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = i * rows / count, last = (i + 1) * rows / count, end; row < last; row = end) {
      const int64_t n = row / s.out_height, first = row % s.out_height;
      end = std::min((n + 1) * s.out_height, last);
      strips[i].parts.push_back({n, first, first + end - row, strips[i].pixels, end - row == s.out_height});
      strips[i].pixels += (end - row) * s.out_width;
    }
  }
  return strips;
}

// Where a task puts its gradients of offset and mask: into the results, as the first or to what is there, or with what
// it leaves
enum class Place { store, add, leave };

// What a task of the backward pass leaves to be added up, in the order of the tasks, when all are done
template <typename acc_t>
struct Leftovers {
  struct Window {
    Buffer<acc_t> rows;  // [rows * W, channels of the block]
    int64_t begin = 0, end = 0;
  };
  std::vector<Window> windows;  // of the gradient of the input, one for each part that is not a whole image
  Buffer<acc_t> weight_grad;    // [chunks of taps, outputs of the group (an even number), backward_width]
  Buffer<acc_t> sample_grads;   // [3 * taps, pixels of the strip]: y and x of each tap, then the masks; or none
};

template <typename scalar_t, typename map_t, typename acc_t, typename factor_t>
struct ForwardCall {
  const DeformConvShape& s;
  const std::vector<Block>& blocks;
  const map_t* map;  // [N, H * W, map_stride]
  int64_t map_stride;
  const map_t* zeros;
  const acc_t *offset, *mask;
  const acc_t* bias;  // [groups, outputs of a group], padded as the sums are
  Weight<const scalar_t> weight;
  factor_t* weights;  // packed
  Images<scalar_t> output;
};

template <typename scalar_t, typename acc_t>
struct BackwardCall {
  const DeformConvShape& s;
  Images<const scalar_t> grad, input;
  const acc_t *offset, *mask;
  Weight<const scalar_t> weight;
  bool by_input, by_sample, by_weight;  // the gradients that are wanted
  Images<scalar_t> input_grad;
  acc_t *offset_grad, *mask_grad;
  Weight<scalar_t> weight_grad;
};

// The functions of one instruction set, for one choice of types
template <typename scalar_t, typename map_t, typename acc_t, typename factor_t>
struct DeformConvKernels {
  void (*lay_out_rows)(
      const DeformConvShape&, const Images<map_t>& to, const Images<const scalar_t>& from, int64_t begin, int64_t end);
  void (*pack_weights)(const ForwardCall<scalar_t, map_t, acc_t, factor_t>&, int64_t begin, int64_t end);
  void (*forward_rows)(const ForwardCall<scalar_t, map_t, acc_t, factor_t>&, int64_t begin, int64_t end);
  void (*backward_strip)(const BackwardCall<scalar_t, acc_t>&, const Strip&, const Block&, Place, Leftovers<acc_t>&);
  int64_t panel, lanes;  // what widths are filled up to
  int64_t pair;          // elements that a factor holds
};

}  // namespace dcnv2::cpu
