// Deformable RoI pooling: the sizes of one call, the checks of its arguments, and the geometry of a box, for every
// backend.
#pragma once

#include <cmath>

#include "roi_bins.h"

namespace dcnv2 {

struct DeformRoIPoolShape {
  int64_t batch, channels, height, width;
  int64_t boxes, pooled_h, pooled_w;
  int64_t sampling_ratio;
  double spatial_scale, gamma;

  DCNV2_HOST_DEVICE int64_t bins() const { return pooled_h * pooled_w; }
  PoolSizes sizes() const {
    return {"deform_roi_pool", batch, 1, channels, 1, height, width, boxes, pooled_h, pooled_w, bins(), 1.0};
  }
};

// Reads the sizes of a call from its tensors. Raises ValueError or TypeError that names the argument at fault.
inline DeformRoIPoolShape check_deform_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma) {
  constexpr const char* op = "deform_roi_pool";
  check_roi_pool(op, input, boxes, output_size, spatial_scale);
  const DeformRoIPoolShape s{input.size(0),  input.size(1),  input.size(2),  input.size(3), boxes.size(0),
                             output_size[0], output_size[1], sampling_ratio, spatial_scale, gamma};
  if (offset.has_value()) {
    check_floating(op, *offset, "offset");
    check_same_device(op, *offset, input, "offset");
    check_sizes(op, *offset, {s.boxes, 2, s.pooled_h, s.pooled_w}, "offset", "[K, 2, Ph, Pw]");
  }
  check_pool_mask(op, mask, input, s.boxes, output_size);
  return s;
}

// One axis of one box, in pixels of the map.
template <typename scalar_t>
struct BoxAxis {
  scalar_t begin, size;
  scalar_t
      grid;  // samples a bin; a whole number, but perhaps too large for an integer, or negative for an inverted box

  DCNV2_HOST_DEVICE BoxAxis(scalar_t low, scalar_t high, scalar_t scale, int64_t sampling_ratio, int64_t bins) {
    begin = low * scale - scalar_t(0.5);
    size = high * scale - scalar_t(0.5) - begin;
    grid = sampling_ratio > 0 ? scalar_t(sampling_ratio) : std::ceil(size / scalar_t(bins));
  }

  // `shift`: the bin's offset times gamma; `extent`: height or width of the map.
  DCNV2_HOST_DEVICE BinAxis<scalar_t> bin(int64_t index, int64_t bins, scalar_t shift, int64_t extent) const {
    const scalar_t step = size / scalar_t(bins) / grid;
    BinAxis<scalar_t> axis{begin + size * shift + scalar_t(index) * size / scalar_t(bins) + step / 2, step, 0, 0};
    // All samples of a small bin are visited, and those of a box without size, which lie in one place.
    if (grid <= 4 || axis.step == 0) {
      axis.last = grid > 0 ? static_cast<int64_t>(grid) : 0;
      return axis;
    }
    // Of those of a large bin most may lie outside; -2 and + 3 leave room for rounding, the sampler decides.
    const scalar_t a = (scalar_t(-1) - axis.start) / axis.step, b = (scalar_t(extent) - axis.start) / axis.step;
    const scalar_t low = axis.step > 0 ? a : b, high = axis.step > 0 ? b : a;
    if (high >= low) {  // not so for NaN
      const scalar_t first = low - 2 > 0 ? low - 2 : scalar_t(0), last = high + 3 < grid ? high + 3 : grid;
      if (first < last) {
        axis.first = static_cast<int64_t>(first);
        axis.last = static_cast<int64_t>(last);
      }
    }
    return axis;
  }
};

// The rows (`is_y`) or the columns of the bin (ph, pw).
template <typename scalar_t>
DCNV2_HOST_DEVICE PoolAxis<scalar_t> locate_axis(
    const DeformRoIPoolShape& s, const PoolArguments<scalar_t>& p, int64_t k, int64_t ph, int64_t pw,
    int64_t /* class */, bool is_y) {
  const scalar_t* box = p.boxes + k * 5;
  const scalar_t gamma = static_cast<scalar_t>(s.gamma);
  const int64_t bins = is_y ? s.pooled_h : s.pooled_w;
  const BoxAxis<scalar_t> axis(
      box[is_y ? 2 : 1], box[is_y ? 4 : 3], static_cast<scalar_t>(s.spatial_scale), s.sampling_ratio, bins);
  const int64_t index = (2 * k + is_y) * s.bins() + ph * s.pooled_w + pw;
  return {
      axis.bin(is_y ? ph : pw, bins, gamma * p.offset_at(index), is_y ? s.height : s.width),
      static_cast<int64_t>(box[0]), index, gamma * axis.size, axis.grid};
}

template <typename scalar_t>
DCNV2_HOST_DEVICE PoolBin<scalar_t> locate_bin(
    const DeformRoIPoolShape& s, const PoolArguments<scalar_t>& p, int64_t k, int64_t bin, int64_t c) {
  const int64_t ph = bin / s.pooled_w, pw = bin % s.pooled_w;
  const PoolAxis<scalar_t> y = locate_axis(s, p, k, ph, pw, c, true), x = locate_axis(s, p, k, ph, pw, c, false);
  const scalar_t samples = y.samples * x.samples;
  return {x.plane, x.offset_index, y.move, x.move, y.axis, x.axis, samples > 1 ? samples : scalar_t(1)};
}

}  // namespace dcnv2
