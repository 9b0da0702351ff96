// Deformable RoI pooling on the CPU, forward and backward.
//
// The map is laid out channels last, so that a sample adds four contiguous channel vectors. Forward, threads share out the
// boxes; backward, each owns a block of channels of the input gradient, so nothing is atomic and every run gives the same
// bits.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "bilinear.h"
#include "cpu/channels_last.h"
#include "deform_roi_pool.h"

namespace dcnv2 {
namespace {

// The tensors of one call in the types and layouts that the loops want.
template <typename scalar_t, typename acc_t>
struct PoolCall {
  const DeformRoIPoolShape& s;
  at::Tensor map;                  // [N, H * W, C], acc_t
  at::Tensor boxes, offset, mask;  // contiguous, acc_t; offset and mask may be undefined
  at::TensorOptions options = at::TensorOptions().dtype(c10::CppTypeToScalarType<acc_t>::value);

  PoolCall(
      const DeformRoIPoolShape& shape, const at::Tensor& input, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_)
      : s(shape) {
    boxes = boxes_.to(options).contiguous();
    if (offset_.has_value()) offset = offset_->to(options).contiguous();
    if (mask_.has_value()) mask = mask_->to(options).contiguous();
    for (int64_t k = 0; k < s.boxes; ++k) {
      const acc_t index = boxes.const_data_ptr<acc_t>()[k * 5];
      TORCH_CHECK_VALUE(
          index >= 0 && index < acc_t(s.batch), "deform_roi_pool: boxes must have a batch index from 0 to ", s.batch - 1,
          " in their first column, got ", index, " in row ", k);
    }
    map = rows_of(input);
  }

  // [N, C, ...] -> [N, pixels, C], without a copy where the layout already is that one
  at::Tensor rows_of(const at::Tensor& t) const {
    const at::Tensor dense = t.contiguous(t.suggest_memory_format());
    const int64_t pixels = t.size(2) * t.size(3), channels = t.size(1);
    const bool last = dense.stride(1) == 1;
    if (last && std::is_same_v<scalar_t, acc_t>) return dense.permute({0, 2, 3, 1}).reshape({t.size(0), pixels, channels});
    at::Tensor rows = at::empty({t.size(0), pixels, channels}, options);
    for (int64_t n = 0; n < t.size(0); ++n) {
      to_channels_last(
          rows.data_ptr<acc_t>() + n * pixels * channels, dense.const_data_ptr<scalar_t>() + n * dense.stride(0), pixels,
          channels, dense.stride(1), last ? channels : 1);
    }
    return rows;
  }

  // The way back, into a tensor [N, C, ...] of the given layout
  at::Tensor from_rows(const at::Tensor& rows, at::IntArrayRef sizes, at::MemoryFormat layout) const {
    const int64_t pixels = sizes[2] * sizes[3], channels = sizes[1];
    const at::Tensor view = rows.view({sizes[0], sizes[2], sizes[3], channels}).permute({0, 3, 1, 2});
    const auto type = c10::CppTypeToScalarType<scalar_t>::value;
    if (layout == at::MemoryFormat::ChannelsLast) return view.to(type);
    at::Tensor result = at::empty(sizes, options.dtype(type));
    for (int64_t n = 0; n < sizes[0]; ++n) {
      from_channels_last(
          result.data_ptr<scalar_t>() + n * result.stride(0), rows.const_data_ptr<acc_t>() + n * pixels * channels,
          pixels, channels, pixels, 1);
    }
    return result;
  }

  // What the loops read, as plain pointers; offset and mask may be null.
  struct Pointers {
    const acc_t *map, *boxes, *offset, *mask;
  };
  Pointers pointers() const {
    return {
        map.const_data_ptr<acc_t>(), boxes.const_data_ptr<acc_t>(),
        offset.defined() ? offset.const_data_ptr<acc_t>() : nullptr,
        mask.defined() ? mask.const_data_ptr<acc_t>() : nullptr};
  }
};

// Calls visit(bin, image, factor, box axes, samples of the y axis, of the x axis) for each bin of box k; factor is the mask
// over the number of samples.
template <typename acc_t, typename pointers_t, typename visit_t>
inline __attribute__((always_inline)) void for_each_bin(
    const DeformRoIPoolShape& s, const pointers_t& p, int64_t k, const visit_t& visit) {
  const acc_t* box = p.boxes + k * 5;
  const acc_t scale = static_cast<acc_t>(s.spatial_scale), gamma = static_cast<acc_t>(s.gamma);
  const BoxAxis<acc_t> x(box[1], box[3], scale, s.sampling_ratio, s.pooled_w);
  const BoxAxis<acc_t> y(box[2], box[4], scale, s.sampling_ratio, s.pooled_h);
  const acc_t samples = y.grid * x.grid > 1 ? y.grid * x.grid : acc_t(1);
  for (int64_t bin = 0; bin < s.bins(); ++bin) {
    const acc_t shift_x = p.offset ? gamma * p.offset[2 * k * s.bins() + bin] : acc_t(0);
    const acc_t shift_y = p.offset ? gamma * p.offset[(2 * k + 1) * s.bins() + bin] : acc_t(0);
    const acc_t mask = p.mask ? p.mask[k * s.bins() + bin] : acc_t(1);
    visit(
        bin, static_cast<int64_t>(box[0]), mask, samples, y, x, y.bin(bin / s.pooled_w, s.pooled_h, shift_y, s.height),
        x.bin(bin % s.pooled_w, s.pooled_w, shift_x, s.width));
  }
}

// pooled [boxes, bins, channels], zeros on entry, for the boxes begin .. end
template <typename acc_t, typename pointers_t>
DCNV2_MULTIVERSION void pool_boxes(
    acc_t* pooled, const DeformRoIPoolShape& s, const pointers_t& p, int64_t begin, int64_t end) {
  const int64_t channels = s.channels;
  for (int64_t k = begin; k < end; ++k) {
    for_each_bin<acc_t>(
        s, p, k,
        [&](int64_t bin, int64_t image, acc_t mask, acc_t samples, const BoxAxis<acc_t>&, const BoxAxis<acc_t>&,
            const BinAxis<acc_t>& y, const BinAxis<acc_t>& x) {
          acc_t* out = pooled + (k * s.bins() + bin) * channels;
          const acc_t* map = p.map + image * s.pixels() * channels;
          bool any = false;
          for (int64_t iy = y.first; iy < y.last; ++iy) {
            for (int64_t ix = x.first; ix < x.last; ++ix) {
              BilinearSample<acc_t, int32_t> sample;
              if (!sample_clamped<acc_t, int32_t>(y.at(iy), x.at(ix), s.height, s.width, sample)) continue;
              any = true;
              acc_t w[4];
              sample.weights(w);
              const acc_t *v0 = map + sample.index[0] * channels, *v1 = map + sample.index[1] * channels;
              const acc_t *v2 = map + sample.index[2] * channels, *v3 = map + sample.index[3] * channels;
              DCNV2_SIMD
              for (int64_t c = 0; c < channels; ++c) out[c] += w[0] * v0[c] + w[1] * v1[c] + w[2] * v2[c] + w[3] * v3[c];
            }
          }
          if (!any) return;
          const acc_t factor = mask / samples;
          DCNV2_SIMD
          for (int64_t c = 0; c < channels; ++c) out[c] *= factor;
        });
  }
}

// The share of the channels first .. last: adds to map_grad [N * H * W + 1, channels], whose last row takes what a clamped
// sample would add twice; sums [boxes, bins, 3] become the derivatives by y, by x and by the mask, over these channels.
template <typename acc_t, typename pointers_t>
DCNV2_MULTIVERSION void pool_backward_channels(
    acc_t* map_grad, acc_t* sums, const acc_t* grad, const DeformRoIPoolShape& s, const pointers_t& p, int64_t first,
    int64_t last) {
  const int64_t channels = s.channels, size = last - first, spare = s.batch * s.pixels() * channels;
  for (int64_t k = 0; k < s.boxes; ++k) {
    for_each_bin<acc_t>(
        s, p, k,
        [&](int64_t bin, int64_t image, acc_t mask, acc_t samples, const BoxAxis<acc_t>& box_y,
            const BoxAxis<acc_t>& box_x, const BinAxis<acc_t>& y, const BinAxis<acc_t>& x) {
          const acc_t* g = grad + (k * s.bins() + bin) * channels + first;
          const acc_t factor = mask / samples, gamma = static_cast<acc_t>(s.gamma);
          acc_t by_y = 0, by_x = 0, by_mask = 0;
          bool any = false;
          for (int64_t iy = y.first; iy < y.last; ++iy) {
            for (int64_t ix = x.first; ix < x.last; ++ix) {
              BilinearSample<acc_t, int32_t> sample;
              if (!sample_clamped<acc_t, int32_t>(y.at(iy), x.at(ix), s.height, s.width, sample)) continue;
              any = true;
              acc_t w[4];
              sample.weights(w);
              const acc_t w0 = factor * w[0], w1 = factor * w[1], w2 = factor * w[2], w3 = factor * w[3];
              int64_t at[4], to[4];
              for (int i = 0; i < 4; ++i) {
                at[i] = (image * s.pixels() + sample.index[i]) * channels;
                bool twice = false;
                for (int j = 0; j < i; ++j) twice |= sample.index[j] == sample.index[i];
                to[i] = twice ? spare : at[i];  // its weight is 0
              }
              const acc_t *v0 = p.map + at[0] + first, *v1 = p.map + at[1] + first;
              const acc_t *v2 = p.map + at[2] + first, *v3 = p.map + at[3] + first;
              acc_t *d0 = map_grad + to[0] + first, *d1 = map_grad + to[1] + first;
              acc_t *d2 = map_grad + to[2] + first, *d3 = map_grad + to[3] + first;
              acc_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
              DCNV2_SIMD_SUM(s0, s1, s2, s3)
              for (int64_t c = 0; c < size; ++c) {
                s0 += g[c] * v0[c];
                s1 += g[c] * v1[c];
                s2 += g[c] * v2[c];
                s3 += g[c] * v3[c];
                d0[c] += w0 * g[c];
                d1[c] += w1 * g[c];
                d2[c] += w2 * g[c];
                d3[c] += w3 * g[c];
              }
              const acc_t dots[4] = {s0, s1, s2, s3};
              by_y += sample.derivative_y(dots);
              by_x += sample.derivative_x(dots);
              by_mask += w[0] * s0 + w[1] * s1 + w[2] * s2 + w[3] * s3;
            }
          }
          acc_t* sum = sums + (k * s.bins() + bin) * 3;
          // A box that is lost may be of infinite size, which times 0 would be NaN.
          sum[0] = any ? factor * gamma * box_y.size * by_y : acc_t(0);
          sum[1] = any ? factor * gamma * box_x.size * by_x : acc_t(0);
          sum[2] = any ? by_mask / samples : acc_t(0);
        });
  }
}

template <typename scalar_t, typename acc_t>
at::Tensor pool_forward(
    const DeformRoIPoolShape& s, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  at::Tensor pooled = at::zeros({s.boxes, s.bins(), s.channels}, call.options);
  const auto pointers = call.pointers();
  at::parallel_for(0, s.boxes, 1, [&](int64_t begin, int64_t end) {
    pool_boxes<acc_t>(pooled.data_ptr<acc_t>(), s, pointers, begin, end);
  });
  return call.from_rows(pooled, {s.boxes, s.channels, s.pooled_h, s.pooled_w}, input.suggest_memory_format());
}

using PoolGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t>
PoolGradients pool_backward(
    const DeformRoIPoolShape& s, const at::Tensor& grad, const at::Tensor& input, const at::Tensor& boxes,
    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& mask, std::array<bool, 3> wanted) {
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  const at::Tensor grads = call.rows_of(grad);
  at::Tensor map_grad = at::zeros({s.batch * s.pixels() + 1, s.channels}, call.options);
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::max<int64_t>(((s.channels + threads - 1) / threads + 15) / 16 * 16, 16);
  const int64_t blocks = (s.channels + block - 1) / block;
  at::Tensor sums = at::zeros({blocks, s.boxes, s.bins(), 3}, call.options);
  const auto pointers = call.pointers();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      pool_backward_channels<acc_t>(
          map_grad.data_ptr<acc_t>(), sums.data_ptr<acc_t>() + b * s.boxes * s.bins() * 3,
          grads.const_data_ptr<acc_t>(), s, pointers, b * block, std::min((b + 1) * block, s.channels));
    }
  });
  const at::Tensor total = sums.sum(0).view({s.boxes, s.pooled_h, s.pooled_w, 3}).permute({0, 3, 1, 2});
  const at::Tensor none = at::empty({0}, input.options());
  const at::Tensor rows = map_grad.narrow(0, 0, s.batch * s.pixels());
  return {
      wanted[0] ? call.from_rows(rows, input.sizes(), input.suggest_memory_format()) : none,
      wanted[1] && offset.has_value() ? at::stack({total.select(1, 1), total.select(1, 0)}, 1).to(offset->scalar_type())
                                      : none,
      wanted[2] && mask.has_value() ? total.narrow(1, 2, 1).contiguous().to(mask->scalar_type()) : none};
}

// Calls fn(scalar, accumulator) with a zero of each type.
template <typename fn_t>
auto dispatch_pool(at::ScalarType type, const fn_t& fn) {
  switch (type) {
    case at::kDouble: return fn(double(), double());
    case at::kFloat: return fn(float(), float());
    case at::kBFloat16: return fn(at::BFloat16(), float());
    case at::kHalf: return fn(at::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, "deform_roi_pool: input must be float64, float32, bfloat16 or float16, got ", type);
  }
}

at::Tensor deform_roi_pool(
    const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef output_size, double spatial_scale, int64_t sampling_ratio,
    double gamma) {
  const DeformRoIPoolShape s =
      check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch_pool(input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_forward<decltype(scalar), decltype(acc)>(s, input, boxes, offset, mask);
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
  return dispatch_pool(input.scalar_type(), [&](auto scalar, auto acc) {
    return pool_backward<decltype(scalar), decltype(acc)>(s, grad, input, boxes, offset, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2

TORCH_LIBRARY_IMPL(dcnv2_d2, CPU, m) {
  m.impl("deform_roi_pool", &dcnv2::deform_roi_pool);
  m.impl("deform_roi_pool_backward", &dcnv2::deform_roi_pool_backward);
}
