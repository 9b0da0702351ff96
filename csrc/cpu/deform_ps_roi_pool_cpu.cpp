// Deformable position-sensitive RoI pooling on the CPU, forward and backward: where a bin lies; the rest is in
// roi_pool.h.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "cpu/roi_pool.h"
#include "deform_ps_roi_pool.h"

namespace dcnv2 {
namespace {

PoolSizes sizes_of(const DeformPSRoIPoolShape& s) {
  return {"deform_ps_roi_pool", s.batch,    s.groups(), s.out_channels(), s.classes, s.height, s.width, s.boxes,
          s.pooled_h,           s.pooled_w, s.parts(),  s.reach};
}

// A function that locates a bin of a box, for the loops that roi_pool.h runs.
template <typename acc_t>
auto locator(const DeformPSRoIPoolShape& s) {
  return [&s](const auto& call, int64_t k, int64_t bin, int64_t c) {
    const acc_t* box = call.box(k);
    const acc_t scale = static_cast<acc_t>(s.spatial_scale), gamma = static_cast<acc_t>(s.gamma);
    const PSBoxAxis<acc_t> x(box[1], box[3], scale), y(box[2], box[4], scale);
    const int64_t ph = bin / s.pooled_w, pw = bin % s.pooled_w, index = s.offset_index(k, c, ph, pw);
    return PoolBin<acc_t>{
        static_cast<int64_t>(box[0]) * s.groups() + s.group(ph, pw),
        index,
        gamma * y.size,
        gamma * x.size,
        y.bin(ph, s.pooled_h, gamma * call.offset_at(index + s.parts()), s.sampling_ratio),
        x.bin(pw, s.pooled_w, gamma * call.offset_at(index), s.sampling_ratio),
        acc_t(0)};
  };
}

at::Tensor deform_ps_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, int64_t group_size) {
  const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
      input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch_pool("deform_ps_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    using acc_t = decltype(acc);
    return pool_forward<decltype(scalar), acc_t>(sizes_of(s), input, boxes, offset, mask, locator<acc_t>(s));
  });
}

PoolGradients deform_ps_roi_pool_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, int64_t group_size, std::array<bool, 3> wanted) {
  constexpr const char* op = "deform_ps_roi_pool";
  const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
      input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
  check_same_dtype(op, grad, input, "grad");
  check_sizes(op, grad, {s.boxes, s.out_channels(), s.pooled_h, s.pooled_w}, "grad", "[K, C / group_size**2, Ph, Pw]");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch_pool(op, input.scalar_type(), [&](auto scalar, auto acc) {
    using acc_t = decltype(acc);
    return pool_backward<decltype(scalar), acc_t>(
        sizes_of(s), grad, input, boxes, offset, mask, wanted, locator<acc_t>(s));
  });
}

}  // namespace
}  // namespace dcnv2

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  m.impl("deform_ps_roi_pool", &dcnv2::deform_ps_roi_pool);
  m.impl("deform_ps_roi_pool_backward", &dcnv2::deform_ps_roi_pool_backward);
}
