// Deformable convolution: the sizes of one call, the checks of its arguments, and where it samples, for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "bilinear.h"
#include "checks.h"

namespace dcnv2 {

struct DeformConvShape {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;

  DCNV2_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  DCNV2_HOST_DEVICE int64_t in_pixels() const { return in_height * in_width; }
  DCNV2_HOST_DEVICE int64_t out_pixels() const { return out_height * out_width; }
  // Where tap (i, j) of the output pixel (ho, wo) samples, in input pixels and before its offset.
  DCNV2_HOST_DEVICE int64_t tap_y(int64_t ho, int64_t i) const { return ho * stride_h - pad_h + i * dilation_h; }
  DCNV2_HOST_DEVICE int64_t tap_x(int64_t wo, int64_t j) const { return wo * stride_w - pad_w + j * dilation_w; }
};

template <typename scalar_t>
struct ModulatedSample : BilinearSample<scalar_t, int32_t> {
  scalar_t mask;

  // Of the four neighbours in the column.
  DCNV2_HOST_DEVICE void column_weights(scalar_t (&w)[4]) const {
    this->weights(w);
    for (int i = 0; i < 4; ++i) w[i] *= mask;
  }
  // Derivatives by the offset's y and x and by the mask, given the dot products of the column's gradient with the four
  // neighbours.
  DCNV2_HOST_DEVICE void derivatives(
      const scalar_t (&dots)[4], scalar_t& by_y, scalar_t& by_x, scalar_t& by_mask) const {
    scalar_t w[4];
    this->weights(w);
    by_y = mask * this->derivative_y(dots);
    by_x = mask * this->derivative_x(dots);
    by_mask = w[0] * dots[0] + w[1] * dots[1] + w[2] * dots[2] + w[3] * dots[3];
  }
};

// The sample of a tap at (tap_y, tap_x) that its offset moves by (dy, dx).
template <typename scalar_t>
DCNV2_HOST_DEVICE ModulatedSample<scalar_t> locate_sample(
    const DeformConvShape& s, int64_t tap_y, int64_t tap_x, scalar_t dy, scalar_t dx, scalar_t mask) {
  ModulatedSample<scalar_t> sample;
  static_cast<BilinearSample<scalar_t, int32_t>&>(sample) = sample_zero_padded<scalar_t, int32_t>(
      scalar_t(tap_y) + dy, scalar_t(tap_x) + dx, static_cast<int32_t>(s.in_height), static_cast<int32_t>(s.in_width));
  sample.mask = mask;
  return sample;
}

// The sample of one tap at one output pixel. `plane` counts the taps of all offset groups and, if `offset` [2 * planes,
// Ho * Wo] and `mask` [planes, Ho * Wo] hold a whole batch, of all images; `mask` may be null.
template <typename scalar_t>
DCNV2_HOST_DEVICE ModulatedSample<scalar_t> locate_sample(
    const DeformConvShape& s, const scalar_t* offset, const scalar_t* mask, int64_t plane, int64_t pixel, int64_t tap_y,
    int64_t tap_x) {
  const scalar_t* at = offset + 2 * plane * s.out_pixels() + pixel;
  return locate_sample(
      s, tap_y, tap_x, at[0], at[s.out_pixels()], mask ? mask[plane * s.out_pixels() + pixel] : scalar_t(1));
}

// Reads the sizes of a call from its tensors. Raises ValueError or TypeError that names the argument at fault.
inline DeformConvShape check_deform_conv(
    const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr const char* op = "deform_conv2d";
  check_floating(op, input, "input");
  check_floating(op, offset, "offset");
  check_same_device(op, offset, input, "offset");
  check_same_device(op, weight, input, "weight");
  check_same_dtype(op, weight, input, "weight");
  TORCH_CHECK_VALUE(input.dim() == 4, op, ": input must have the shape [N, C, H, W], got ", input.sizes());
  TORCH_CHECK_VALUE(
      input.size(2) * input.size(3) < std::numeric_limits<int32_t>::max(), op,
      ": input must have fewer than 2**31 pixels an image, got ", input.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.numel() > 0, op,
      ": weight must have the shape [O, C / groups, kh, kw], none of them 0, got ", weight.sizes());
  TORCH_CHECK_VALUE(
      stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": stride must be two numbers above 0, got ", stride);
  TORCH_CHECK_VALUE(
      padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op, ": padding must be two numbers not below 0, got ",
      padding);
  TORCH_CHECK_VALUE(
      dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, op, ": dilation must be two numbers above 0, got ",
      dilation);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(
        (stride[i] | padding[i] | dilation[i]) >> 30 == 0, op,
        ": stride, padding and dilation must be below 2**30, got ", stride, ", ", padding, " and ", dilation);
  }

  DeformConvShape s;
  s.batch = input.size(0), s.in_channels = input.size(1), s.in_height = input.size(2), s.in_width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = stride[0], s.stride_w = stride[1], s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];

  TORCH_CHECK_VALUE(
      s.in_channels > 0 && s.in_channels % weight.size(1) == 0, op, ": input must have a multiple of weight's ",
      weight.size(1), " channels (C / groups), got ", s.in_channels);
  s.groups = s.in_channels / weight.size(1);
  TORCH_CHECK_VALUE(
      s.out_channels % s.groups == 0, op, ": weight must have a multiple of ", s.groups,
      " output channels (groups), got ", s.out_channels);

  const int64_t free_h = s.in_height + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t free_w = s.in_width + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1;
  TORCH_CHECK_VALUE(
      s.in_height > 0 && s.in_width > 0 && free_h >= 0 && free_w >= 0, op, ": input of ", s.in_height, " x ",
      s.in_width, " with padding ", padding, " must be at least as large as the dilated kernel, got a kernel of ",
      s.kernel_h, " x ", s.kernel_w, " with dilation ", dilation);
  s.out_height = free_h / s.stride_h + 1;
  s.out_width = free_w / s.stride_w + 1;

  TORCH_CHECK_VALUE(
      offset.dim() == 4 && offset.size(1) > 0 && offset.size(1) % (2 * s.taps()) == 0, op,
      ": offset must have the shape [N, 2 * offset_groups * kh * kw, Ho, Wo], a multiple of ", 2 * s.taps(),
      " channels, got ", offset.sizes());
  s.offset_groups = offset.size(1) / (2 * s.taps());
  TORCH_CHECK_VALUE(
      s.in_channels % s.offset_groups == 0, op,
      ": offset must have channels for a number of offset groups that "
      "divides the ",
      s.in_channels, " channels of input, got ", offset.size(1), " channels, which make ", s.offset_groups,
      " offset groups");
  check_sizes(
      op, offset, {s.batch, 2 * s.offset_groups * s.taps(), s.out_height, s.out_width}, "offset",
      "[N, 2 * offset_groups * kh * kw, Ho, Wo]");
  if (mask.has_value()) {
    check_floating(op, *mask, "mask");
    check_same_device(op, *mask, input, "mask");
    check_sizes(
        op, *mask, {s.batch, s.offset_groups * s.taps(), s.out_height, s.out_width}, "mask",
        "[N, offset_groups * kh * kw, Ho, Wo]");
  }
  if (bias.has_value()) {
    check_same_device(op, *bias, input, "bias");
    check_same_dtype(op, *bias, input, "bias");
    check_sizes(op, *bias, {s.out_channels}, "bias", "[O]");
  }
  return s;
}

}  // namespace dcnv2
