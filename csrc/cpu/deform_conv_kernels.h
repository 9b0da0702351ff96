// All of deform_conv2d for one instruction set: what DCNV2_ISA, DCNV2_VECTOR_BYTES and DCNV2_BFLOAT16_PAIRS say
// (isa.h).

// clang-format off: each builds on those before it
#include "cpu/vectors.h"
#include "cpu/product.h"
#include "cpu/deform_conv_tile.h"
#include "cpu/deform_conv_forward.h"
#include "cpu/deform_conv_backward.h"
// clang-format on

namespace dcnv2::cpu::DCNV2_ISA {

// The functions of this instruction set, for one choice of types
template <typename scalar_t, typename map_t, typename acc_t, typename column_t, typename factor_t>
DeformConvKernels<scalar_t, map_t, acc_t, factor_t> kernels() {
  return {
      &lay_out_rows<scalar_t, map_t, acc_t>,
      &pack_weights<scalar_t, map_t, acc_t, column_t, factor_t>,
      &forward_rows<scalar_t, map_t, acc_t, column_t, factor_t>,
      &backward_strip<scalar_t, acc_t, column_t, factor_t>,
      panel<acc_t>,
      lanes<acc_t>,
      sizeof(factor_t) / sizeof(column_t)};
}

}  // namespace dcnv2::cpu::DCNV2_ISA

#undef DCNV2_ISA
#undef DCNV2_VECTOR_BYTES
#undef DCNV2_BFLOAT16_PAIRS
