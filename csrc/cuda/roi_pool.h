// What the RoI poolings share on a GPU.
//
// A warp takes one bin, for the channels of one class, and each lane some of the channels. Two lanes find the pixels
// that the bin's samples touch and their weights, one for the rows and one for the columns; all lanes then visit each
// of these pixels once. The gradients of offset and mask are summed over the channels within the warp.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include <array>
#include <tuple>

#include "cuda/channels_last.h"
#include "roi_bins.h"

namespace dcnv2::cuda {

constexpr int kChunk = 16;  // samples an axis that are taken at once

template <typename entry_t, int capacity>
struct FixedVector {
  entry_t data[capacity];
  int count;

  __device__ void clear() { count = 0; }
  __device__ int size() const { return count; }
  __device__ void push_back(const entry_t& entry) { data[count++] = entry; }
  __device__ entry_t& operator[](int64_t i) { return data[i]; }
  __device__ const entry_t& operator[](int64_t i) const { return data[i]; }
};

template <typename acc_t>
using ChunkStencil = AxisStencil<acc_t, FixedVector<StencilEntry<acc_t>, 2 * kChunk>>;

// Elements from one to the next.
struct Strides {
  int64_t plane, pixel, channel;
};

// The bin of one warp. Its methods are called by all lanes at once.
template <typename acc_t>
struct WarpBin {
  int64_t k, index, klass;  // box, bin of the box, class
  int64_t plane, offset_index;
  acc_t move_y, move_x, samples;
  BinAxis<acc_t> axis;            // of the rows in lane 0, of the columns in the others
  int64_t down, across;           // chunks an axis
  ChunkStencil<acc_t>* stencils;  // of rows and columns, in shared memory
  int64_t located = -1;           // the chunk that they hold
  int lane;
  bool touches = false;  // whether there is any sample that is not outside

  // False for a warp too many.
  template <typename shape_t>
  __device__ bool locate(
      const shape_t& shape, const PoolSizes& s, const PoolArguments<acc_t>& p, ChunkStencil<acc_t> (*shared)[2]) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    klass = item % s.classes;
    index = item / s.classes % s.bins();
    k = item / s.classes / s.bins();
    if (k >= s.boxes) return false;
    stencils = shared[threadIdx.x / kWarp];
    lane = threadIdx.x % kWarp;
    PoolBin<acc_t> bin = locate_bin(shape, p, k, index, klass);
    // A box of no image has no samples: to raise an error, the CPU would have to wait for the GPU.
    const acc_t image = p.boxes[k * 5];
    if (!(image >= 0 && image < acc_t(s.batch))) bin.y.last = bin.y.first;
    plane = bin.plane, offset_index = bin.offset_index;
    move_y = bin.move_y, move_x = bin.move_x, samples = bin.samples;
    down = (bin.y.last - bin.y.first + kChunk - 1) / kChunk;
    across = (bin.x.last - bin.x.first + kChunk - 1) / kChunk;
    axis = bin.y;
    if (lane > 0) axis = bin.x;
    return true;
  }

  // visit(row entry, column entry) for each pixel, or several times in a bin of more than kChunk samples an axis. On
  // return `samples` is what to divide the sum by.
  template <typename visit_t>
  __device__ void for_each_pixel(const PoolSizes& s, const visit_t& visit) {
    int64_t rows = 0, columns = 0;
    for (int64_t chunk = 0; chunk < down * across; ++chunk) {
      if (chunk != located) {
        __syncwarp();
        if (lane < 2) {
          const int64_t begin = axis.first + (lane == 0 ? chunk / across : chunk % across) * kChunk;
          const int64_t end = begin + kChunk < axis.last ? begin + kChunk : axis.last;
          stencils[lane].locate(axis, begin, end, lane == 0 ? s.height : s.width, static_cast<acc_t>(s.reach));
        }
        __syncwarp();
        located = chunk;
      }
      if (chunk % across == 0) rows += stencils[0].samples;
      if (chunk < across) columns += stencils[1].samples;
      for (int i = 0; i < stencils[0].entries.size(); ++i) {
        const StencilEntry<acc_t> row = stencils[0].entries[i];
#pragma unroll 4
        for (int j = 0; j < stencils[1].entries.size(); ++j) visit(row, stencils[1].entries[j]);
      }
    }
    touches = rows > 0 && columns > 0;
    if (samples == 0) samples = acc_t(rows * columns);
  }
};

template <int vec, typename scalar_t, typename acc_t>
__device__ __forceinline__ void load_strided(acc_t (&values)[vec], const scalar_t* from, int64_t stride) {
  if (stride == 1) {
    load(values, from);
  } else {
#pragma unroll
    for (int i = 0; i < vec; ++i) values[i] = static_cast<acc_t>(from[i * stride]);
  }
}

// out [K, channels, Ph, Pw] and map [N, groups, H, W, channels], both of any layout; mask [K, 1, Ph, Pw] or null
// With vec > 1 the channels of the map are contiguous.
template <int vec, typename scalar_t, typename acc_t, typename shape_t>
__global__ void __launch_bounds__(kThreads) pool_kernel(
    scalar_t* __restrict__ out, const scalar_t* __restrict__ map, const acc_t* __restrict__ mask,
    const PoolArguments<acc_t> arguments, const shape_t shape, const PoolSizes s, Strides out_strides,
    Strides strides) {
  __shared__ ChunkStencil<acc_t> stencils[kThreads / kWarp][2];
  WarpBin<acc_t> warp;
  if (!warp.locate(shape, s, arguments, stencils)) return;
  const int64_t size = s.channels / s.classes;
  const acc_t factor = mask ? mask[warp.k * s.bins() + warp.index] : acc_t(1);
  for (int64_t first = 0; first < size; first += kWarp * vec) {
    const int64_t c = first + warp.lane * vec, channel = warp.klass * size + c;
    const scalar_t* plane = map + warp.plane * strides.plane + channel * strides.channel;
    acc_t sum[vec] = {};
    warp.for_each_pixel(s, [&](const StencilEntry<acc_t>& row, const StencilEntry<acc_t>& column) {
      if (c >= size) return;
      const acc_t weight = row.weight * column.weight;
      acc_t value[vec];
      load(value, plane + (row.pixel * s.width + column.pixel) * strides.pixel);
#pragma unroll
      for (int e = 0; e < vec; ++e) sum[e] += weight * value[e];
    });
    if (c >= size) continue;
#pragma unroll
    for (int e = 0; e < vec; ++e) sum[e] = warp.touches ? factor / warp.samples * sum[e] : acc_t(0);
    scalar_t* to = out + warp.k * out_strides.plane + warp.index * out_strides.pixel + channel * out_strides.channel;
    if (out_strides.channel == 1) {
      store(to, sum);
    } else {
#pragma unroll
      for (int e = 0; e < vec; ++e) to[e * out_strides.channel] = static_cast<scalar_t>(sum[e]);
    }
  }
}

// grad as `out` above. map_grad [N, groups, H, W, channels] (its channels contiguous), offset_grad and mask_grad, each
// null if not wanted, are added to; of the latter two one lane of a warp adds the sum over its channels.
template <int vec, typename scalar_t, typename acc_t, typename shape_t>
__global__ void __launch_bounds__(kThreads) pool_backward_kernel(
    acc_t* __restrict__ map_grad, acc_t* __restrict__ offset_grad, acc_t* __restrict__ mask_grad,
    const scalar_t* __restrict__ grad, const scalar_t* __restrict__ map, const acc_t* __restrict__ mask,
    const PoolArguments<acc_t> arguments, const shape_t shape, const PoolSizes s, Strides grad_strides,
    Strides strides) {
  __shared__ ChunkStencil<acc_t> stencils[kThreads / kWarp][2];
  WarpBin<acc_t> warp;
  if (!warp.locate(shape, s, arguments, stencils)) return;
  const int64_t size = s.channels / s.classes;
  const acc_t factor = mask ? mask[warp.k * s.bins() + warp.index] : acc_t(1);
  acc_t by_y = 0, by_x = 0, by_mask = 0;
  // The number of samples of some bins is known only after a walk over them.
  if (warp.samples == 0) warp.for_each_pixel(s, [](const StencilEntry<acc_t>&, const StencilEntry<acc_t>&) {});
  const acc_t share = factor / warp.samples;  // of a sample in the bin
  for (int64_t first = 0; first < size; first += kWarp * vec) {
    const int64_t c = first + warp.lane * vec, channel = warp.klass * size + c;
    const scalar_t* plane = map + warp.plane * strides.plane + channel * strides.channel;
    acc_t* plane_grad = map_grad + warp.plane * s.pixels() * s.channels + channel;
    acc_t g[vec] = {};
    if (c < size) {
      load_strided(
          g, grad + warp.k * grad_strides.plane + warp.index * grad_strides.pixel + channel * grad_strides.channel,
          grad_strides.channel);
    }
    warp.for_each_pixel(s, [&](const StencilEntry<acc_t>& row, const StencilEntry<acc_t>& column) {
      if (c >= size) return;
      const int64_t pixel = row.pixel * s.width + column.pixel;
      const acc_t weight = row.weight * column.weight;
      if (map_grad && share * weight != 0) atomic_add(plane_grad + pixel * s.channels, share * weight, g);
      if (!offset_grad && !mask_grad) return;
      acc_t value[vec], dot = 0;
      load(value, plane + pixel * strides.pixel);
#pragma unroll
      for (int e = 0; e < vec; ++e) dot += g[e] * value[e];
      by_y += row.slope * column.weight * dot;
      by_x += row.weight * column.slope * dot;
      by_mask += weight * dot;
    });
  }
  by_y = lane_sum(by_y, kWarp);
  by_x = lane_sum(by_x, kWarp);
  by_mask = lane_sum(by_mask, kWarp);
  if (warp.lane != 0 || !warp.touches)
    return;  // a box that is lost may be of infinite size, which times 0 would be NaN
  if (offset_grad) {
    atomicAdd(offset_grad + warp.offset_index, share * warp.move_x * by_x);
    atomicAdd(offset_grad + warp.offset_index + s.offset_stride, share * warp.move_y * by_y);
  }
  if (mask_grad) atomicAdd(mask_grad + warp.k * s.bins() + warp.index, by_mask / warp.samples);
}

// The tensors of one call in the types and layouts that the kernels want.
template <typename scalar_t, typename acc_t>
struct PoolCall {
  const PoolSizes s;
  const at::Tensor boxes, offset, mask;  // contiguous, acc_t; offset and mask may be undefined
  at::Tensor map;                        // [N, groups, H, W, channels], of the layout in `strides`
  Strides strides;

  static constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;

  static at::Tensor arranged(const std::optional<at::Tensor>& t) {
    return t.has_value() ? t->to(acc_type).contiguous() : at::Tensor();
  }

  PoolCall(
      const PoolSizes& sizes, const at::Tensor& input, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_)
      : s(sizes), boxes(arranged(boxes_)), offset(arranged(offset_)), mask(arranged(mask_)) {
    strides = {s.pixels() * s.channels, s.channels, 1};
    const at::Tensor dense = input.contiguous(input.suggest_memory_format());
    if (s.groups > 1) {  // input channel c * groups + g is channel c of plane g
      map = dense.reshape({s.batch, s.channels, s.groups, s.pixels()}).permute({0, 2, 3, 1}).contiguous();
    } else if (dense.stride(1) != 1 && s.boxes * s.bins() * 96 < s.batch * s.pixels() * int64_t(sizeof(scalar_t))) {
      // To turn the map to channels last costs reading and writing it once. To sample it as it is costs about 6 memory
      // sectors of 32 bytes a bin and channel, where a channel vector uses them whole: worth it for a few boxes on a
      // large map only.
      map = dense;
      strides = {s.pixels() * s.channels, 1, s.pixels()};
    } else {
      map = to_rows<scalar_t>(dense);
    }
  }

  PoolArguments<acc_t> arguments() const {
    return {boxes.const_data_ptr<acc_t>(), offset.defined() ? offset.const_data_ptr<acc_t>() : nullptr};
  }
  const acc_t* mask_data() const { return mask.defined() ? mask.const_data_ptr<acc_t>() : nullptr; }

  // Of a dense tensor [K, channels, Ph, Pw]
  Strides pooled_strides(const at::Tensor& t) const {
    const bool last = t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return {s.bins() * s.channels, last ? s.channels : 1, last ? 1 : s.bins()};
  }

  // Calls fn(vec, grid), unless there is nothing to do. `pooled`: see above
  template <typename fn_t>
  void launch(const at::Tensor& pooled, const fn_t& fn) const {
    const int64_t warps = s.boxes * s.bins() * s.classes, size = s.channels / s.classes;
    if (warps == 0 || size == 0) return;
    const bool aligned = reinterpret_cast<uintptr_t>(pooled.const_data_ptr()) % 16 == 0 && strides.channel == 1;
    dispatch_vector<scalar_t>(
        aligned ? size : 1, map.const_data_ptr(), [&](auto vec) { fn(vec, blocks_for(warps, kThreads / kWarp)); });
  }

  at::Tensor to_input(const at::Tensor& map_grad, const at::Tensor& input) const {
    if (s.groups == 1) return from_rows<scalar_t, acc_t>(map_grad, input.sizes(), input.suggest_memory_format());
    return map_grad.permute({0, 3, 1, 2})
        .reshape(input.sizes())
        .to(input.scalar_type())
        .contiguous(input.suggest_memory_format());
  }
};

template <typename scalar_t, typename acc_t, typename shape_t>
at::Tensor pool_forward(
    const shape_t& shape, const at::Tensor& input, const at::Tensor& boxes, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const PoolSizes s = shape.sizes();
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  const at::Tensor pooled = at::empty(
      {s.boxes, s.channels, s.pooled_h, s.pooled_w}, input.options().memory_format(input.suggest_memory_format()));
  call.launch(pooled, [&](auto vec, unsigned grid) {
    pool_kernel<vec(), scalar_t, acc_t, shape_t><<<grid, kThreads, 0, stream>>>(
        pooled.data_ptr<scalar_t>(), call.map.template const_data_ptr<scalar_t>(), call.mask_data(), call.arguments(),
        shape, s, call.pooled_strides(pooled), call.strides);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return pooled;
}

using PoolGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename scalar_t, typename acc_t, typename shape_t>
PoolGradients pool_backward(
    const shape_t& shape, const at::Tensor& grad_, const at::Tensor& input, const at::Tensor& boxes,
    const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& mask, std::array<bool, 3> wanted) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const PoolSizes s = shape.sizes();
  const PoolCall<scalar_t, acc_t> call(s, input, boxes, offset, mask);
  const at::Tensor grad = grad_.contiguous(grad_.suggest_memory_format());
  const at::TensorOptions acc_options = call.boxes.options();
  wanted[1] = wanted[1] && offset.has_value();
  wanted[2] = wanted[2] && mask.has_value();
  const at::Tensor none = at::empty({0}, input.options());
  const at::Tensor map_grad = wanted[0] ? at::zeros({s.batch, s.groups, s.pixels(), s.channels}, acc_options) : none;
  const at::Tensor offset_grad = wanted[1] ? at::zeros(offset->sizes(), acc_options) : none;
  const at::Tensor mask_grad = wanted[2] ? at::zeros(mask->sizes(), acc_options) : none;
  call.launch(grad, [&](auto vec, unsigned grid) {
    pool_backward_kernel<vec(), scalar_t, acc_t, shape_t><<<grid, kThreads, 0, stream>>>(
        wanted[0] ? map_grad.data_ptr<acc_t>() : nullptr, wanted[1] ? offset_grad.data_ptr<acc_t>() : nullptr,
        wanted[2] ? mask_grad.data_ptr<acc_t>() : nullptr, grad.const_data_ptr<scalar_t>(),
        call.map.template const_data_ptr<scalar_t>(), call.mask_data(), call.arguments(), shape, s,
        call.pooled_strides(grad), call.strides);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {
      wanted[0] ? call.to_input(map_grad, input) : none, wanted[1] ? offset_grad.to(offset->scalar_type()) : none,
      wanted[2] ? mask_grad.to(mask->scalar_type()) : none};
}

}  // namespace dcnv2::cuda
