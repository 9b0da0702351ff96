// The RoI poolings' operators, once for every backend. `backend_t` has functions forward<scalar_t, acc_t>(shape, input,
// boxes, offset, mask), backward<scalar_t, acc_t>(shape, grad, input, boxes, offset, mask, wanted) and
// sums_in_any_order(name), which a backward pass whose order of summation may vary calls.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "deform_ps_roi_pool.h"
#include "deform_roi_pool.h"

namespace dcnv2 {

template <typename backend_t>
struct RoIPoolOperators {
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  using Optional = const std::optional<at::Tensor>&;

  static at::Tensor deform_roi_pool(
      const at::Tensor& input, const at::Tensor& boxes, Optional offset, Optional mask, at::IntArrayRef output_size,
      double spatial_scale, int64_t sampling_ratio, double gamma) {
    const DeformRoIPoolShape s =
        check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
    return forward("deform_roi_pool", s, input, boxes, offset, mask);
  }

  static Gradients deform_roi_pool_backward(
      const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, Optional offset, Optional mask,
      at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio, double gamma,
      std::array<bool, 3> wanted) {
    const DeformRoIPoolShape s =
        check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
    check_grad("deform_roi_pool", grad, input, {s.boxes, s.channels, s.pooled_h, s.pooled_w}, "[K, C, Ph, Pw]");
    // Each element of the other gradients is the sum of one bin.
    if (wanted[0]) backend_t::sums_in_any_order("deform_roi_pool_backward");
    return backward("deform_roi_pool", s, grad, input, boxes, offset, mask, wanted);
  }

  static at::Tensor deform_ps_roi_pool(
      const at::Tensor& input, const at::Tensor& boxes, Optional offset, Optional mask, at::IntArrayRef output_size,
      double spatial_scale, int64_t sampling_ratio, double gamma, int64_t group_size) {
    const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
        input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
    return forward("deform_ps_roi_pool", s, input, boxes, offset, mask);
  }

  static Gradients deform_ps_roi_pool_backward(
      const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, Optional offset, Optional mask,
      at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio, double gamma, int64_t group_size,
      std::array<bool, 3> wanted) {
    const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
        input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
    check_grad(
        "deform_ps_roi_pool", grad, input, {s.boxes, s.out_channels(), s.pooled_h, s.pooled_w},
        "[K, C / group_size**2, Ph, Pw]");
    // Bins may share a part of the offset, classes share the mask.
    backend_t::sums_in_any_order("deform_ps_roi_pool_backward");
    return backward("deform_ps_roi_pool", s, grad, input, boxes, offset, mask, wanted);
  }

 private:
  template <typename shape_t>
  static at::Tensor forward(
      const char* op, const shape_t& shape, const at::Tensor& input, const at::Tensor& boxes, Optional offset,
      Optional mask) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return dispatch(op, input.scalar_type(), [&](auto scalar, auto acc) {
      return backend_t::template forward<decltype(scalar), decltype(acc)>(shape, input, boxes, offset, mask);
    });
  }

  template <typename shape_t>
  static Gradients backward(
      const char* op, const shape_t& shape, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes,
      Optional offset, Optional mask, const std::array<bool, 3>& wanted) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return dispatch(op, input.scalar_type(), [&](auto scalar, auto acc) {
      return backend_t::template backward<decltype(scalar), decltype(acc)>(
          shape, grad, input, boxes, offset, mask, wanted);
    });
  }
};

}  // namespace dcnv2
