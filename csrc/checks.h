// Checks that every operator makes of its tensors, and the choice by their type. They raise TypeError or ValueError
// that names the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace dcnv2 {

inline void check_floating(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.is_floating_point(), op, ": ", name, " must have a floating-point dtype, got ", t.scalar_type());
}

inline void check_same_device(const char* op, const at::Tensor& t, const at::Tensor& input, const char* name) {
  TORCH_CHECK_VALUE(
      t.device() == input.device(), op, ": ", name, " must be on the device of input (", input.device(), "), got ",
      t.device());
}

inline void check_same_dtype(const char* op, const at::Tensor& t, const at::Tensor& input, const char* name) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == input.scalar_type(), op, ": ", name, " must have the dtype of input (", input.scalar_type(),
      "), got ", t.scalar_type());
}

inline void check_sizes(
    const char* op, const at::Tensor& t, at::IntArrayRef expected, const char* name, const char* meaning) {
  TORCH_CHECK_VALUE(
      t.sizes() == expected, op, ": ", name, " must have the shape ", expected, " (", meaning, "), got ", t.sizes());
}

inline void check_grad(
    const char* op, const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef expected, const char* meaning) {
  check_same_device(op, grad, input, "grad");
  check_same_dtype(op, grad, input, "grad");
  check_sizes(op, grad, expected, "grad", meaning);
}

// Calls fn(scalar, accumulator) with a zero of each type.
template <typename fn_t>
auto dispatch(const char* op, at::ScalarType type, const fn_t& fn) {
  switch (type) {
    case at::kDouble:
      return fn(double(), double());
    case at::kFloat:
      return fn(float(), float());
    case at::kBFloat16:
      return fn(at::BFloat16(), float());
    case at::kHalf:
      return fn(at::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, op, ": input must be float64, float32, bfloat16 or float16, got ", type);
  }
}

}  // namespace dcnv2
