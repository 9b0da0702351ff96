// What the RoI poolings share, for every backend: checks, the place of a bin, and the pixels that its samples touch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "bilinear.h"
#include "checks.h"

namespace dcnv2 {

// The checks that every RoI pooling makes.
inline void check_roi_pool(
    const char* op, const at::Tensor& input, const at::Tensor& boxes, at::IntArrayRef output_size,
    double spatial_scale) {
  check_floating(op, input, "input");
  check_floating(op, boxes, "boxes");
  check_same_device(op, boxes, input, "boxes");
  TORCH_CHECK_VALUE(input.dim() == 4, op, ": input must have the shape [N, C, H, W], got ", input.sizes());
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(1) == 5, op,
      ": boxes must have the shape [K, 5] (batch index, x1, y1, x2, y2), got ", boxes.sizes());
  TORCH_CHECK_VALUE(
      input.size(2) * input.size(3) > 0 || boxes.size(0) == 0, op, ": input must have pixels to pool from, got ",
      input.sizes());
  TORCH_CHECK_VALUE(
      input.size(2) * input.size(3) < std::numeric_limits<int32_t>::max(), op,
      ": input must have fewer than 2**31 pixels an image, got ", input.sizes());
  TORCH_CHECK_VALUE(
      output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, op,
      ": output_size must be two numbers above 0, got ", output_size);
  TORCH_CHECK_VALUE(spatial_scale > 0, op, ": spatial_scale must be above 0, got ", spatial_scale);
}

inline void check_pool_mask(
    const char* op, const std::optional<at::Tensor>& mask, const at::Tensor& input, int64_t boxes,
    at::IntArrayRef output_size) {
  if (!mask.has_value()) return;
  check_floating(op, *mask, "mask");
  check_same_device(op, *mask, input, "mask");
  check_sizes(op, *mask, {boxes, 1, output_size[0], output_size[1]}, "mask", "[K, 1, Ph, Pw]");
}

// One axis of one bin: its samples, of which only those that can lie on the map are visited.
template <typename scalar_t>
struct BinAxis {
  scalar_t start, step;  // of its samples
  int64_t first, last;   // the samples first .. last - 1

  DCNV2_HOST_DEVICE scalar_t at(int64_t i) const { return start + scalar_t(i) * step; }
};

// One axis of one bin, for the channels of one class (which share their offsets), as locate_axis finds it.
template <typename scalar_t>
struct PoolAxis {
  BinAxis<scalar_t> axis;
  int64_t plane, offset_index;  // of the map; where the offset of this axis lies
  scalar_t move;                // how far an offset of 1 moves the bin, in pixels
  scalar_t samples;             // as PoolBin's, of this axis alone
};

// One bin, for the channels of one class.
template <typename scalar_t>
struct PoolBin {
  int64_t plane;            // of the map
  int64_t offset_index;     // where its x offset lies
  scalar_t move_y, move_x;  // how far an offset of 1 moves it, in pixels
  BinAxis<scalar_t> y, x;
  scalar_t samples;  // what the sum is divided by; 0 stands for the number of samples that are not outside
};

// The sizes that the loops need. `channels` are those of the result; the map has `groups` planes an image, of as many
// channels each; the y offsets lie `offset_stride` after the x offsets.
struct PoolSizes {
  const char* op;
  int64_t batch, groups, channels, classes, height, width;
  int64_t boxes, pooled_h, pooled_w, offset_stride;
  double reach;

  DCNV2_HOST_DEVICE int64_t pixels() const { return height * width; }
  DCNV2_HOST_DEVICE int64_t bins() const { return pooled_h * pooled_w; }
};

// What locate_bin reads; `offset` may be null.
template <typename scalar_t>
struct PoolArguments {
  const scalar_t *boxes, *offset;

  DCNV2_HOST_DEVICE scalar_t offset_at(int64_t index) const { return offset ? offset[index] : scalar_t(0); }
};

// A pixel that samples of one axis touch, with the sum of their weights and the derivative of that sum.
template <typename scalar_t>
struct StencilEntry {
  int32_t pixel;
  scalar_t weight, slope;
};

// One axis of a bin: the pixels that its samples touch, in order. `entries_t`: a vector of entries
template <typename scalar_t, typename entries_t>
struct AxisStencil {
  entries_t entries;
  int64_t samples;  // that are not outside

  // For the samples begin .. end - 1.
  DCNV2_HOST_DEVICE void locate(
      const BinAxis<scalar_t>& axis, int64_t begin, int64_t end, int64_t extent, scalar_t reach) {
    entries.clear();
    samples = 0;
    // From the first pixel on, also in an inverted box: then only the last two pixels can be there already.
    const bool inverted = axis.step < 0;
    StencilEntry<scalar_t> low{-1, 0, 0}, high{-1, 0, 0};
    for (int64_t n = begin; n < end; ++n) {
      AxisSample<scalar_t, int32_t> sample;
      if (!clamp_to_axis<scalar_t, int32_t>(
              axis.at(inverted ? begin + end - 1 - n : n), static_cast<int32_t>(extent), reach, sample)) {
        continue;
      }
      ++samples;
      if (sample.low != low.pixel) {
        add(low);
        if (sample.low != high.pixel) {
          add(high);
          high = {sample.low, 0, 0};
        }
        low = high;
        high = {-1, 0, 0};
      }
      low.weight += 1 - sample.distance;
      if (sample.high == sample.low) continue;
      low.slope -= 1;
      high.pixel = sample.high;
      high.weight += sample.distance;
      high.slope += 1;
    }
    add(low);
    add(high);
  }

 private:
  DCNV2_HOST_DEVICE void add(const StencilEntry<scalar_t>& entry) {
    if (entry.pixel >= 0) entries.push_back(entry);
  }
};

}  // namespace dcnv2
