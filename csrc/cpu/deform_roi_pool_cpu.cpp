// Deformable RoI pooling on the CPU, forward and backward: the loops are in roi_pool.h.
#include <torch/library.h>

#include "cpu/roi_pool.h"
#include "roi_pool_operators.h"

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  using Operators = dcnv2::RoIPoolOperators<dcnv2::cpu::Pooling>;
  m.impl("deform_roi_pool", &Operators::deform_roi_pool);
  m.impl("deform_roi_pool_backward", &Operators::deform_roi_pool_backward);
}
