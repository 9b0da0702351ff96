// Deformable position-sensitive RoI pooling on a GPU, forward and backward: the kernels are in roi_pool.h.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "cuda/roi_pool.h"
#include "deform_ps_roi_pool.h"

namespace dcnv2::cuda {
namespace {

at::Tensor deform_ps_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, int64_t group_size) {
  const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
      input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_ps_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_forward<decltype(scalar), decltype(acc)>(s, input, boxes, offset, mask);
  });
}

PoolGradients deform_ps_roi_pool_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, int64_t group_size, std::array<bool, 3> wanted) {
  const DeformPSRoIPoolShape s = check_deform_ps_roi_pool(
      input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size);
  check_grad(
      "deform_ps_roi_pool", grad, input, {s.boxes, s.out_channels(), s.pooled_h, s.pooled_w},
      "[K, C / group_size**2, Ph, Pw]");
  // All are summed by atomics: bins may share a part of the offset, classes share the mask.
  at::globalContext().alertNotDeterministic("deform_ps_roi_pool_backward_cuda");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_ps_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_backward<decltype(scalar), decltype(acc)>(s, grad, input, boxes, offset, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2::cuda

TORCH_LIBRARY_IMPL(dcnv2_d2, CUDA, m) {
  m.impl("deform_ps_roi_pool", &dcnv2::cuda::deform_ps_roi_pool);
  m.impl("deform_ps_roi_pool_backward", &dcnv2::cuda::deform_ps_roi_pool_backward);
}
