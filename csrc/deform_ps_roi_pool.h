// Deformable position-sensitive RoI pooling: the sizes of one call, the checks of its arguments, and the geometry of a
// box, for every backend. A kernel adds up the samples BinAxis::at(i), i = 0 .. sampling_ratio - 1 of both axes, by
// clamp_to_axis with the reach below, and divides by the number of those that it does not refuse.
#pragma once

#include <cmath>

#include "roi_bins.h"

namespace dcnv2 {

struct DeformPSRoIPoolShape {
  static constexpr double reach = 0.5;  // pixels beyond the first and last one where a sample still counts

  int64_t batch, channels, height, width;
  int64_t boxes, pooled_h, pooled_w;
  int64_t sampling_ratio, group_size;
  int64_t classes, part_h, part_w;  // of the offset [K, 2 * classes, part_h, part_w]; without one: 1, Ph, Pw
  double spatial_scale, gamma;

  DCNV2_HOST_DEVICE int64_t groups() const { return group_size * group_size; }
  DCNV2_HOST_DEVICE int64_t out_channels() const { return channels / groups(); }
  DCNV2_HOST_DEVICE int64_t parts() const { return part_h * part_w; }

  PoolSizes sizes() const {
    return {
        "deform_ps_roi_pool",
        batch,
        groups(),
        out_channels(),
        classes,
        height,
        width,
        boxes,
        pooled_h,
        pooled_w,
        parts(),
        reach};
  }

  // The group that serves the bin (ph, pw): channel c of the output reads channel c * groups() + group(ph, pw) of the
  // input.
  DCNV2_HOST_DEVICE int64_t group(int64_t ph, int64_t pw) const {
    return ph * group_size / pooled_h * group_size + pw * group_size / pooled_w;
  }
  // Where the x offset of the bin (ph, pw) lies for channels of class `c`; its y offset lies parts() later.
  DCNV2_HOST_DEVICE int64_t offset_index(int64_t k, int64_t c, int64_t ph, int64_t pw) const {
    return (k * classes + c) * 2 * parts() + ph * part_h / pooled_h * part_w + pw * part_w / pooled_w;
  }
};

// Reads the sizes of a call from its tensors. Raises ValueError or TypeError that names the argument at fault.
inline DeformPSRoIPoolShape check_deform_ps_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, int64_t group_size) {
  constexpr const char* op = "deform_ps_roi_pool";
  check_roi_pool(op, input, boxes, output_size, spatial_scale);
  TORCH_CHECK_VALUE(sampling_ratio > 0, op, ": sampling_ratio must be above 0, got ", sampling_ratio);
  TORCH_CHECK_VALUE(group_size > 0, op, ": group_size must be above 0, got ", group_size);
  TORCH_CHECK_VALUE(
      input.size(1) % (group_size * group_size) == 0, op,
      ": input must have a multiple of group_size**2 = ", group_size * group_size, " channels, got ", input.size(1));

  DeformPSRoIPoolShape s{input.size(0),  input.size(1),  input.size(2),  input.size(3), boxes.size(0),
                         output_size[0], output_size[1], sampling_ratio, group_size,    1,
                         output_size[0], output_size[1], spatial_scale,  gamma};
  if (offset.has_value()) {
    check_floating(op, *offset, "offset");
    check_same_device(op, *offset, input, "offset");
    TORCH_CHECK_VALUE(
        offset->dim() == 4 && offset->size(0) == s.boxes && offset->size(1) > 0 && offset->size(1) % 2 == 0 &&
            offset->size(2) > 0 && offset->size(3) > 0,
        op, ": offset must have the shape [", s.boxes, ", 2 * classes, Qh, Qw], got ", offset->sizes());
    s.classes = offset->size(1) / 2, s.part_h = offset->size(2), s.part_w = offset->size(3);
    TORCH_CHECK_VALUE(
        s.out_channels() % s.classes == 0, op, ": offset must have channels for a number of classes that divides the ",
        s.out_channels(), " channels of the result, got ", offset->size(1), " channels, which make ", s.classes,
        " classes");
  }
  check_pool_mask(op, mask, input, s.boxes, output_size);
  return s;
}

// One axis of one box, in pixels of the map. The box is in whole pixels of the image, its far side included, and has at
// least a tenth of a pixel of the map; NaN stays NaN, which is outside any map.
template <typename scalar_t>
struct PSBoxAxis {
  scalar_t begin, size;

  DCNV2_HOST_DEVICE PSBoxAxis(scalar_t low, scalar_t high, scalar_t scale) {
    begin = std::round(low) * scale - scalar_t(0.5);
    size = (std::round(high) + 1) * scale - scalar_t(0.5) - begin;
    if (size < scalar_t(0.1)) size = scalar_t(0.1);
  }

  // `shift`: the bin's offset times gamma. The first sample lies in the near corner of the bin, none in the far one.
  DCNV2_HOST_DEVICE BinAxis<scalar_t> bin(int64_t index, int64_t bins, scalar_t shift, int64_t sampling_ratio) const {
    const scalar_t length = size / scalar_t(bins);
    return {begin + size * shift + scalar_t(index) * length, length / scalar_t(sampling_ratio), 0, sampling_ratio};
  }
};

// The rows (`is_y`) or the columns of the bin (ph, pw).
template <typename scalar_t>
DCNV2_HOST_DEVICE PoolAxis<scalar_t> locate_axis(
    const DeformPSRoIPoolShape& s, const PoolArguments<scalar_t>& p, int64_t k, int64_t ph, int64_t pw, int64_t c,
    bool is_y) {
  const scalar_t* box = p.boxes + k * 5;
  const scalar_t gamma = static_cast<scalar_t>(s.gamma);
  const PSBoxAxis<scalar_t> axis(box[is_y ? 2 : 1], box[is_y ? 4 : 3], static_cast<scalar_t>(s.spatial_scale));
  const int64_t index = s.offset_index(k, c, ph, pw) + (is_y ? s.parts() : 0);
  return {
      axis.bin(is_y ? ph : pw, is_y ? s.pooled_h : s.pooled_w, gamma * p.offset_at(index), s.sampling_ratio),
      static_cast<int64_t>(box[0]) * s.groups() + s.group(ph, pw), index, gamma * axis.size, scalar_t(0)};
}

template <typename scalar_t>
DCNV2_HOST_DEVICE PoolBin<scalar_t> locate_bin(
    const DeformPSRoIPoolShape& s, const PoolArguments<scalar_t>& p, int64_t k, int64_t bin, int64_t c) {
  const int64_t ph = bin / s.pooled_w, pw = bin % s.pooled_w;
  const PoolAxis<scalar_t> y = locate_axis(s, p, k, ph, pw, c, true), x = locate_axis(s, p, k, ph, pw, c, false);
  return {x.plane, x.offset_index, y.move, x.move, y.axis, x.axis, scalar_t(0)};
}

}  // namespace dcnv2
