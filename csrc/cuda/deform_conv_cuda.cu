// Deformable convolution on a GPU, forward and backward.
//
// The output pixels of the whole batch are taken in tiles. A tile is sampled into columns, which one batched matrix
// product of torch's own (cuBLAS) multiplies with the weights of every group; so memory beyond the results is bounded,
// whatever the size of the image or the batch. A block of threads first computes the positions and the bilinear weights
// of its samples, once for all channels; then neighbouring threads take neighbouring channels of each sample.
// Forward in half types has a second way, fused_deform_conv.h, taken where the environment says DCNV2_FUSED=1.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>
#include <tuple>

#include "bilinear.h"
#include "cuda/channels_last.h"
#include "cuda/fused_deform_conv.h"
#include "deform_conv.h"

namespace dcnv2::cuda {
namespace {

// Bytes of columns: enough pixels to fill a large GPU, and no more than its L2 cache holds. Not tuned yet
// (docs/gpu.md).
constexpr int64_t kWorkspace = 32 << 20;
constexpr int kSamples = 64;  // of a block of threads: kPixels neighbouring pixels at kSamples / kPixels taps
constexpr int kPixels = 16;

template <typename acc_t>
struct TileSample : ModulatedSample<acc_t> {
  int64_t at[4];     // elements of the map before each neighbour's channels, -1 for one that counts as zero
  int64_t column;    // elements of the columns before its channels of the first group, -1 for no sample
  acc_t weight[4];   // of each neighbour
  int64_t place[2];  // of its y offset and of its mask, were these contiguous
};

// For one offset group, and a tile of `rows` output pixels.
__host__ __device__ inline int64_t blocks_per_group(const DeformConvShape& s, int64_t rows) {
  return ((rows + kPixels - 1) / kPixels * kPixels * s.taps() + kSamples - 1) / kSamples;
}

// Fills the samples of this block of threads. The tile begins at the output pixel `first`, counted over the batch.
template <typename acc_t>
__device__ void locate_samples(
    TileSample<acc_t>* samples, const DeformConvShape& s, const AnyTensor& offset, const AnyTensor& mask, int64_t first,
    int64_t rows, int64_t group) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread >= kSamples) return;
  TileSample<acc_t>& sample = samples[thread];
  const int64_t id = blockIdx.x % blocks_per_group(s, rows) * kSamples + thread;
  const int64_t row = id / (kPixels * s.taps()) * kPixels + id % kPixels, tap = id / kPixels % s.taps();
  sample.column = row < rows ? (row * s.taps() + tap) * (s.in_channels / s.groups) : -1;
  if (row >= rows) return;
  const int64_t image = (first + row) / s.out_pixels(), pixel = (first + row) % s.out_pixels();
  const int64_t y = pixel / s.out_width, x = pixel % s.out_width, plane = group * s.taps() + tap;
  static_cast<ModulatedSample<acc_t>&>(sample) = locate_sample<acc_t>(
      s, s.tap_y(y, tap / s.kernel_w), s.tap_x(x, tap % s.kernel_w), offset.at<acc_t>(image, 2 * plane, y, x),
      offset.at<acc_t>(image, 2 * plane + 1, y, x), mask.data ? mask.at<acc_t>(image, plane, y, x) : acc_t(1));
  sample.column_weights(sample.weight);
  for (int n = 0; n < 4; ++n) {
    const int64_t at = image * s.in_pixels() + sample.index[n];
    sample.at[n] = sample.index[n] < s.in_pixels() ? at * s.in_channels : -1;
  }
  const int64_t all = image * s.offset_groups * s.taps() + plane;
  sample.place[0] = 2 * all * s.out_pixels() + pixel;
  sample.place[1] = all * s.out_pixels() + pixel;
}

// The vectors of a sample's neighbours: all on their way before any is used, zero where outside.
template <int vec, typename scalar_t, typename acc_t>
__device__ __forceinline__ void load_neighbours(
    Raw<vec, scalar_t> (&raw)[4], const TileSample<acc_t>& sample, const scalar_t* map) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    raw[n] = {};  // not multiplied by 0 where outside: 0 * inf is NaN
    if (sample.at[n] >= 0) raw[n] = load_raw<vec>(map + sample.at[n]);
  }
}

// Where the columns [groups, rows, taps, C / groups] hold a channel of the first sample.
__device__ __forceinline__ int64_t column_place(const DeformConvShape& s, int64_t rows, int64_t channel) {
  const int64_t per_group = s.in_channels / s.groups, group = s.groups == 1 ? 0 : channel / per_group;
  return group * rows * s.taps() * per_group + channel - group * per_group;
}

// columns [groups, rows, taps, C / groups] = mask * interpolated value, of a map [N, H * W, C]
// offset [N, 2 * G * taps, Ho, Wo], mask [N, G * taps, Ho, Wo] or nothing
template <int vec, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) sample_columns_kernel(
    scalar_t* __restrict__ columns, const scalar_t* __restrict__ map, const AnyTensor offset, const AnyTensor mask,
    const DeformConvShape s, int64_t first, int64_t rows) {
  __shared__ TileSample<acc_t> samples[kSamples];
  const int64_t group = blockIdx.x / blocks_per_group(s, rows), size = s.in_channels / s.offset_groups;
  locate_samples(samples, s, offset, mask, first, rows, group);
  __syncthreads();
  for (int64_t c = threadIdx.x * vec; c < size; c += blockDim.x * vec) {
    const scalar_t* const from = map + group * size + c;
    scalar_t* const to = columns + column_place(s, rows, group * size + c);
#pragma unroll 1
    for (int i = threadIdx.y; i < kSamples; i += blockDim.y) {
      const TileSample<acc_t>& sample = samples[i];
      if (sample.column < 0) continue;
      Raw<vec, scalar_t> raw[4];
      load_neighbours<vec>(raw, sample, from);
      acc_t sum[vec] = {};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        acc_t value[vec];
        unpack<scalar_t>(value, raw[n]);
#pragma unroll
        for (int e = 0; e < vec; ++e) sum[e] += sample.weight[n] * value[e];
      }
      store(to + sample.column, sum);
    }
  }
}

// On entry `columns` [groups, rows, taps, C / groups] holds the gradient of the columns; on exit, if `rebuild`, the
// columns. map_grad [N, H * W, C], null if not wanted, is added to; offset_grad [N, 2 * G * taps, Ho, Wo] and mask_grad
// [N, G * taps, Ho, Wo], null if not wanted, are written, each element by one thread. `vec` accumulators make 16 bytes,
// so that lanes add to neighbouring vectors.
template <int vec, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) backward_columns_kernel(
    scalar_t* __restrict__ columns, acc_t* __restrict__ map_grad, acc_t* __restrict__ offset_grad,
    acc_t* __restrict__ mask_grad, const scalar_t* __restrict__ map, const AnyTensor offset, const AnyTensor mask,
    const DeformConvShape s, int64_t first, int64_t rows, bool rebuild) {
  __shared__ TileSample<acc_t> samples[kSamples];
  const int64_t group = blockIdx.x / blocks_per_group(s, rows), size = s.in_channels / s.offset_groups;
  locate_samples(samples, s, offset, mask, first, rows, group);
  __syncthreads();
  for (int i = threadIdx.y; i < kSamples; i += blockDim.y) {  // all lanes of a warp, or none: lane_sum needs them
    const TileSample<acc_t>& sample = samples[i];
    const bool exists = sample.column >= 0;
    acc_t dots[4] = {0, 0, 0, 0};
    if (exists) {
      for (int64_t c = threadIdx.x * vec; c < size; c += blockDim.x * vec) {
        const int64_t channel = group * size + c;
        scalar_t* const column = columns + column_place(s, rows, channel) + sample.column;
        Raw<vec, scalar_t> raw[4];
        load_neighbours<vec>(raw, sample, map + channel);
        acc_t grad[vec], sum[vec] = {};
        load(grad, column);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (sample.at[n] < 0) continue;
          acc_t value[vec];
          unpack<scalar_t>(value, raw[n]);
#pragma unroll
          for (int e = 0; e < vec; ++e) {
            dots[n] += grad[e] * value[e];
            sum[e] += sample.weight[n] * value[e];
          }
        }
        if (rebuild) store(column, sum);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          // At offset 0, as in a new layer, three of four weights are 0.
          if (map_grad && sample.at[n] >= 0 && sample.weight[n] != 0) {
            atomic_add(map_grad + sample.at[n] + channel, sample.weight[n], grad);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) dots[n] = lane_sum(dots[n], blockDim.x);
    if (exists && threadIdx.x == 0) {
      acc_t by_y, by_x, by_mask;
      sample.derivatives(dots, by_y, by_x, by_mask);
      offset_grad[sample.place[0]] = by_y;
      offset_grad[sample.place[0] + s.out_pixels()] = by_x;
      if (mask_grad) mask_grad[sample.place[1]] = by_mask;
    }
  }
}

// The tensors of one call in the types and layouts that the kernels want.
template <typename scalar_t, typename acc_t>
struct Call {
  const DeformConvShape& s;
  const at::Tensor map;      // [N, H * W, C]
  const AnyTensor offset;    // [N, 2 * G * taps, Ho, Wo]
  const AnyTensor mask;      // [N, G * taps, Ho, Wo] or nothing
  const at::Tensor weights;  // [groups, O / groups, taps * C / groups]
  int64_t rows, tile;        // output pixels in all, and of a tile

  Call(
      const DeformConvShape& shape, const at::Tensor& input, const at::Tensor& offset_, const at::Tensor& weight,
      const std::optional<at::Tensor>& mask_)
      : s(shape),
        map(to_rows<scalar_t>(input)),
        offset(offset_),
        mask(mask_.has_value() ? AnyTensor(*mask_) : AnyTensor()),
        weights(weight
                    .permute({0, 2, 3, 1})  // no copy of weights that are channels last
                    .contiguous()
                    .view({s.groups, s.out_channels / s.groups, s.taps() * (s.in_channels / s.groups)})),
        rows(s.batch * s.out_pixels()) {
    const int64_t row_bytes = s.taps() * s.in_channels * static_cast<int64_t>(sizeof(scalar_t));
    const int64_t most = std::max<int64_t>(kWorkspace / row_bytes, kPixels);
    const int64_t tiles = std::max<int64_t>((rows + most - 1) / most, 1);  // of equal size
    tile = std::min(rows, ((rows + tiles - 1) / tiles + kPixels - 1) / kPixels * kPixels);
  }

  at::Tensor workspace() const { return at::empty({tile * s.taps() * s.in_channels}, map.options()); }

  // The columns of a tile [groups, pixels, taps * C / groups], in the workspace
  at::Tensor tile_columns(const at::Tensor& workspace, int64_t pixels) const {
    const int64_t width = s.taps() * s.in_channels / s.groups;
    return workspace.narrow(0, 0, s.groups * pixels * width).view({s.groups, pixels, width});
  }

  // The outputs of a tile [groups, pixels, O / groups], of `all` [N, Ho * Wo, O]
  at::Tensor tile_outputs(const at::Tensor& all, int64_t first, int64_t pixels) const {
    return all.view({rows, s.groups, s.out_channels / s.groups}).narrow(0, first, pixels).transpose(0, 1);
  }

  // Calls fn(vec, grid, block) to launch over a tile: neighbouring threads on neighbouring channels of one offset
  // group. Of `vec` channels element_t has 16 bytes, where size and alignment allow it.
  template <typename element_t, typename fn_t>
  void launch(int64_t pixels, const fn_t& fn) const {
    const int64_t size = s.in_channels / s.offset_groups, per_group = s.in_channels / s.groups;
    const int64_t aligned = size % (16 / sizeof(element_t)) == 0 ? per_group : 1;
    dispatch_vector<element_t>(aligned, map.const_data_ptr(), [&](auto vec) {
      unsigned lanes = 1;
      while (lanes < kWarp && lanes * vec() < size) lanes *= 2;
      fn(vec, blocks_for(blocks_per_group(s, pixels) * s.offset_groups, 1), dim3(lanes, kThreads / lanes));
    });
  }
};

// Off unless asked for, until measured (docs/gpu.md).
bool wants_fused() {
  const char* value = std::getenv("DCNV2_FUSED");
  return value && std::string_view(value) == "1";
}

template <typename scalar_t, typename acc_t>
at::Tensor forward(
    const DeformConvShape& s, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Call<scalar_t, acc_t> call(s, input, offset, weight, mask);
  const at::Tensor output = at::empty({s.batch, s.out_pixels(), s.out_channels}, input.options());
  const auto result = [&] {
    return from_rows<scalar_t, scalar_t>(
        output, {s.batch, s.out_channels, s.out_height, s.out_width}, input.suggest_memory_format(), bias);
  };
  if constexpr (!std::is_same_v<scalar_t, acc_t>) {
    if (wants_fused() && can_fuse<scalar_t>(s, call.map, call.weights)) {
      fused_forward<scalar_t>(output, s, call.map, call.offset, call.mask, call.weights);
      return result();
    }
  }
  const at::Tensor workspace = call.workspace();
  for (int64_t first = 0; first < call.rows; first += call.tile) {
    const int64_t pixels = std::min(call.tile, call.rows - first);
    call.template launch<scalar_t>(pixels, [&](auto vec, unsigned grid, dim3 block) {
      sample_columns_kernel<vec(), scalar_t, acc_t><<<grid, block, 0, stream>>>(
          workspace.data_ptr<scalar_t>(), call.map.template const_data_ptr<scalar_t>(), call.offset, call.mask, s,
          first, pixels);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    call.tile_outputs(output, first, pixels)
        .baddbmm_(call.tile_columns(workspace, pixels), call.weights.transpose(1, 2), 0);
  }
  return result();
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t>
Gradients backward(
    const DeformConvShape& s, const at::Tensor& grad_, const at::Tensor& input, const at::Tensor& offset,
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, std::array<bool, 4> wanted) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Call<scalar_t, acc_t> call(s, input, offset, weight, mask);
  const at::Tensor grad = to_rows<scalar_t>(grad_);
  const at::TensorOptions acc_options = input.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  const at::Tensor none = at::empty({0}, input.options());
  const at::Tensor map_grad = wanted[0] ? at::zeros(call.map.sizes(), acc_options) : none;
  const at::Tensor offset_grad = at::empty(offset.sizes(), acc_options);
  const bool wants_mask = wanted[3] && mask.has_value();
  const at::Tensor mask_grad = wants_mask ? at::empty(mask->sizes(), acc_options) : none;
  const at::Tensor weights_grad = wanted[2] ? at::zeros(call.weights.sizes(), acc_options) : none;
  const at::Tensor workspace = call.workspace();
  for (int64_t first = 0; first < call.rows; first += call.tile) {
    const int64_t pixels = std::min(call.tile, call.rows - first);
    const at::Tensor tile_grad = call.tile_outputs(grad, first, pixels);
    at::Tensor columns = call.tile_columns(workspace, pixels);
    at::bmm_out(columns, tile_grad, call.weights);
    call.template launch<acc_t>(pixels, [&](auto vec, unsigned grid, dim3 block) {
      backward_columns_kernel<vec(), scalar_t, acc_t><<<grid, block, 0, stream>>>(
          workspace.data_ptr<scalar_t>(), wanted[0] ? map_grad.data_ptr<acc_t>() : nullptr,
          offset_grad.data_ptr<acc_t>(), wants_mask ? mask_grad.data_ptr<acc_t>() : nullptr,
          call.map.template const_data_ptr<scalar_t>(), call.offset, call.mask, s, first, pixels, wanted[2]);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (!wanted[2]) continue;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      weights_grad.baddbmm_(tile_grad.transpose(1, 2), columns);
    } else {
      weights_grad.add_(at::bmm(tile_grad.transpose(1, 2), columns));
    }
  }
  const at::Tensor weight_grad = wanted[2] ? at::empty(weight.sizes(), weight.options()) : none;
  if (wanted[2]) {
    const int64_t outputs = s.out_channels / s.groups, inputs = s.in_channels / s.groups;
    weight_grad.view({s.groups, outputs, inputs, s.taps()})
        .copy_(weights_grad.view({s.groups, outputs, s.taps(), inputs}).transpose(2, 3));
  }
  return {
      wanted[0] ? from_rows<scalar_t, acc_t>(map_grad, input.sizes(), input.suggest_memory_format()) : none,
      wanted[1] ? offset_grad.to(offset.scalar_type()) : none, weight_grad,
      wants_mask ? mask_grad.to(mask->scalar_type()) : none};
}

at::Tensor deform_conv2d(
    const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, bias, mask, stride, padding, dilation);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_conv2d", input.scalar_type(), [&](auto scalar, auto acc) {
    return forward<decltype(scalar), decltype(acc)>(s, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv2d_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& offset, const at::Tensor& weight,
    const std::optional<at::Tensor>& mask, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 4> wanted) {
  const DeformConvShape s = check_deform_conv(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_grad("deform_conv2d", grad, input, {s.batch, s.out_channels, s.out_height, s.out_width}, "[N, O, Ho, Wo]");
  // The gradient of the input is summed by atomics; the others have one order of summation.
  if (wanted[0]) at::globalContext().alertNotDeterministic("deform_conv2d_backward_cuda");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return dispatch("deform_conv2d", input.scalar_type(), [&](auto scalar, auto acc) {
    return backward<decltype(scalar), decltype(acc)>(s, grad, input, offset, weight, mask, wanted);
  });
}

}  // namespace
}  // namespace dcnv2::cuda

TORCH_LIBRARY_IMPL(dcnv2_d2, CUDA, m) {
  m.impl("deform_conv2d", &dcnv2::cuda::deform_conv2d);
  m.impl("deform_conv2d_backward", &dcnv2::cuda::deform_conv2d_backward);
}
