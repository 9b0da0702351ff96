// Deformable RoI pooling on a GPU, forward and backward: the kernels are in roi_pool.h.
#include <torch/library.h>

#include "cuda/roi_pool.h"
#include "roi_pool_operators.h"

TORCH_LIBRARY_IMPL(dcnv2_d2, CUDA, m) {
  using Operators = dcnv2::RoIPoolOperators<dcnv2::cuda::Pooling>;
  m.impl("deform_roi_pool", &Operators::deform_roi_pool);
  m.impl("deform_roi_pool_backward", &Operators::deform_roi_pool_backward);
}
