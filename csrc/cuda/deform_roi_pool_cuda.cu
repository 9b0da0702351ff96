// Deformable RoI pooling on a GPU, forward and backward: the kernels are in roi_pool.h.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "cuda/roi_pool.h"
#include "deform_roi_pool.h"

namespace dcnv2::cuda {
namespace {

at::Tensor deform_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma) {
  const DeformRoIPoolShape s =
      check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_forward<decltype(scalar), decltype(acc)>(s, input, boxes, offset, mask);
  });
}

PoolGradients deform_roi_pool_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma, std::array<bool, 3> wanted) {
  const DeformRoIPoolShape s =
      check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_grad("deform_roi_pool", grad, input, {s.boxes, s.channels, s.pooled_h, s.pooled_w}, "[K, C, Ph, Pw]");
  // The gradient of the input is summed by atomics; each element of the others is the sum of one warp.
  if (wanted[0]) at::globalContext().alertNotDeterministic("deform_roi_pool_backward_cuda");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_roi_pool", input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_backward<decltype(scalar), decltype(acc)>(s, grad, input, boxes, offset, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2::cuda

TORCH_LIBRARY_IMPL(dcnv2_d2, CUDA, m) {
  m.impl("deform_roi_pool", &dcnv2::cuda::deform_roi_pool);
  m.impl("deform_roi_pool_backward", &dcnv2::cuda::deform_roi_pool_backward);
}
