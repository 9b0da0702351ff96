// Deformable RoI pooling on the CPU, forward and backward: where a bin lies; the rest is in roi_pool.h.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "cpu/roi_pool.h"
#include "deform_roi_pool.h"

namespace dcnv2 {
namespace {

PoolSizes sizes_of(const DeformRoIPoolShape& s) {
  return {"deform_roi_pool", s.batch, 1,          s.channels, 1,        s.height,
          s.width,           s.boxes, s.pooled_h, s.pooled_w, s.bins(), 1.0};
}

// A function that locates a bin of a box, for the loops that roi_pool.h runs.
template <typename acc_t>
auto locator(const DeformRoIPoolShape& s) {
  return [&s](const auto& call, int64_t k, int64_t bin, int64_t) {
    const acc_t* box = call.box(k);
    const acc_t scale = static_cast<acc_t>(s.spatial_scale), gamma = static_cast<acc_t>(s.gamma);
    const BoxAxis<acc_t> x(box[1], box[3], scale, s.sampling_ratio, s.pooled_w);
    const BoxAxis<acc_t> y(box[2], box[4], scale, s.sampling_ratio, s.pooled_h);
    const int64_t index = 2 * k * s.bins() + bin;
    return PoolBin<acc_t>{
        static_cast<int64_t>(box[0]),
        index,
        gamma * y.size,
        gamma * x.size,
        y.bin(bin / s.pooled_w, s.pooled_h, gamma * call.offset_at(index + s.bins()), s.height),
        x.bin(bin % s.pooled_w, s.pooled_w, gamma * call.offset_at(index), s.width),
        std::max(y.grid * x.grid, acc_t(1))};
  };
}

at::Tensor deform_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma) {
  const DeformRoIPoolShape s =
      check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch_pool("deform_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    using acc_t = decltype(acc);
    return pool_forward<decltype(scalar), acc_t>(sizes_of(s), input, boxes, offset, mask, locator<acc_t>(s));
  });
}

PoolGradients deform_roi_pool_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, std::array<bool, 3> wanted) {
  const DeformRoIPoolShape s =
      check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_same_dtype("deform_roi_pool", grad, input, "grad");
  check_sizes("deform_roi_pool", grad, {s.boxes, s.channels, s.pooled_h, s.pooled_w}, "grad", "[K, C, Ph, Pw]");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch_pool("deform_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    using acc_t = decltype(acc);
    return pool_backward<decltype(scalar), acc_t>(
        sizes_of(s), grad, input, boxes, offset, mask, wanted, locator<acc_t>(s));
  });
}

}  // namespace
}  // namespace dcnv2

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  m.impl("deform_roi_pool", &dcnv2::deform_roi_pool);
  m.impl("deform_roi_pool_backward", &dcnv2::deform_roi_pool_backward);
}
