// Every operator's schema, once. Shapes: N images, C channels, H x W map, O output channels, kh x kw kernel, G offset
// groups, Ho x Wo output, K boxes, Ph x Pw bins.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

namespace {

std::string build_info() {
  std::string info = "torch " TORCH_VERSION ", ";
#if defined(__clang__)
  info += "clang " __clang_version__;
#elif defined(__GNUC__)
  info += "gcc " __VERSION__;
#elif defined(_MSC_VER)
  info += "msvc " + std::to_string(_MSC_VER);
#endif
#ifdef _OPENMP
  info += ", OpenMP";
#else
  info += ", one thread only";
#endif
#ifdef WITH_CUDA
  info += ", CPU and CUDA";
#else
  info += ", CPU only";
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(dcnv2_d2, m) {
  m.set_python_module("dcnv2_d2.ops._registrations");
  m.def("build_info() -> str", &build_info);

  // input [N, C, H, W], offset [N, 2*G*kh*kw, Ho, Wo], weight [O, C/groups, kh, kw], bias [O],
  // mask [N, G*kh*kw, Ho, Wo] -> [N, O, Ho, Wo]
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation) -> Tensor");
  // grad [N, O, Ho, Wo] -> gradients of input, offset, weight, mask; of those not `wanted`, an empty tensor
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");

  // input [N, C, H, W], boxes [K, 5] (batch index, x1, y1, x2, y2), offset [K, 2, Ph, Pw], mask [K, 1, Ph, Pw]
  // -> [K, C, Ph, Pw]
  m.def(
      "deform_roi_pool(Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma) -> Tensor");
  // grad [K, C, Ph, Pw] -> gradients of input, offset, mask; of those not `wanted`, an empty tensor
  m.def(
      "deform_roi_pool_backward(Tensor grad, Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool[3] wanted) "
      "-> (Tensor, Tensor, Tensor)");

  // input [N, C, H, W], boxes as above, offset [K, 2 * classes, Qh, Qw], mask [K, 1, Ph, Pw]
  // -> [K, C / group_size**2, Ph, Pw]
  m.def(
      "deform_ps_roi_pool(Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma, int group_size) -> Tensor");
  // grad [K, C / group_size**2, Ph, Pw] -> gradients of input, offset, mask; of those not `wanted`, an empty tensor
  m.def(
      "deform_ps_roi_pool_backward(Tensor grad, Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, int group_size, bool[3] wanted) "
      "-> (Tensor, Tensor, Tensor)");
}
