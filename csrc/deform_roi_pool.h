// Deformable RoI pooling: the sizes of one call, the checks of its arguments, and the geometry of a box, for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "bilinear.h"
#include "checks.h"

namespace dcnv2 {

struct DeformRoIPoolShape {
  int64_t batch, channels, height, width;
  int64_t boxes, pooled_h, pooled_w;
  int64_t sampling_ratio;
  double spatial_scale, gamma;

  int64_t pixels() const { return height * width; }
  int64_t bins() const { return pooled_h * pooled_w; }
};

// The checks that every RoI pooling makes.
inline void check_roi_pool(
    const char* op, const at::Tensor& input, const at::Tensor& boxes, at::IntArrayRef output_size, double spatial_scale) {
  check_floating(op, input, "input");
  check_floating(op, boxes, "boxes");
  check_same_device(op, boxes, input, "boxes");
  TORCH_CHECK_VALUE(input.dim() == 4, op, ": input must have the shape [N, C, H, W], got ", input.sizes());
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(1) == 5, op, ": boxes must have the shape [K, 5] (batch index, x1, y1, x2, y2), got ",
      boxes.sizes());
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

// Reads the sizes of a call from its tensors. Raises ValueError or TypeError that names the argument at fault.
inline DeformRoIPoolShape check_deform_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma) {
  constexpr const char* op = "deform_roi_pool";
  check_roi_pool(op, input, boxes, output_size, spatial_scale);
  const DeformRoIPoolShape s{
      input.size(0),  input.size(1),  input.size(2),  input.size(3), boxes.size(0),
      output_size[0], output_size[1], sampling_ratio, spatial_scale, gamma};
  if (offset.has_value()) {
    check_floating(op, *offset, "offset");
    check_same_device(op, *offset, input, "offset");
    check_sizes(op, *offset, {s.boxes, 2, s.pooled_h, s.pooled_w}, "offset", "[K, 2, Ph, Pw]");
  }
  check_pool_mask(op, mask, input, s.boxes, output_size);
  return s;
}

// One axis of one bin: its samples, of which only those that can lie on the map are visited.
template <typename scalar_t>
struct BinAxis {
  scalar_t start, step;  // of its samples
  int64_t first, last;   // the samples first .. last - 1

  DCNV2_HOST_DEVICE scalar_t at(int64_t i) const { return start + scalar_t(i) * step; }
};

// One axis of one box, in pixels of the map.
template <typename scalar_t>
struct BoxAxis {
  scalar_t begin, size;
  scalar_t grid;  // samples a bin; a whole number, but perhaps too large for an integer, or negative for an inverted box

  DCNV2_HOST_DEVICE BoxAxis(scalar_t low, scalar_t high, scalar_t scale, int64_t sampling_ratio, int64_t bins) {
    begin = low * scale - scalar_t(0.5);
    size = high * scale - scalar_t(0.5) - begin;
    grid = sampling_ratio > 0 ? scalar_t(sampling_ratio) : std::ceil(size / scalar_t(bins));
  }

  // `shift`: the bin's offset times gamma; `extent`: height or width of the map.
  DCNV2_HOST_DEVICE BinAxis<scalar_t> bin(int64_t index, int64_t bins, scalar_t shift, int64_t extent) const {
    const scalar_t step = size / scalar_t(bins) / grid;
    BinAxis<scalar_t> axis{begin + size * shift + scalar_t(index) * size / scalar_t(bins) + step / 2, step, 0, 0};
    // Of the samples of a large bin most may lie outside; -2 and + 3 leave room for rounding, the sampler decides.
    const scalar_t a = (scalar_t(-1) - axis.start) / axis.step, b = (scalar_t(extent) - axis.start) / axis.step;
    const scalar_t low = axis.step > 0 ? a : b, high = axis.step > 0 ? b : a;
    if (axis.step == 0) {  // a box without size: all samples in one place
      axis.last = grid > 0 ? static_cast<int64_t>(grid) : 0;
    } else if (high >= low) {  // not so for NaN
      const scalar_t first = low - 2 > 0 ? low - 2 : scalar_t(0), last = high + 3 < grid ? high + 3 : grid;
      if (first < last) {
        axis.first = static_cast<int64_t>(first);
        axis.last = static_cast<int64_t>(last);
      }
    }
    return axis;
  }
};

}  // namespace dcnv2
