// What the RoI poolings share on a GPU.
//
// A block of threads takes a box: the channels of one class, kBins bins at most. First each thread finds the pixels
// that the samples of one bin touch in one axis, with their weights. Then a warp takes a bin, and a lane one vector of
// channels in it: the lanes list the bin's pixels, whose vectors are then read several at once, each once for all
// samples. The bins of an NCHW tensor, which lie channel by channel, pass through shared memory.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "cuda/channels_last.h"
#include "roi_bins.h"

namespace dcnv2::cuda {

constexpr int kChunk = 4;   // samples an axis that are taken at once
constexpr int kAtOnce = 4;  // pixels whose vectors are read before the first is used
constexpr int kWarps = kThreads / kWarp;
template <typename acc_t>
constexpr int kBins = 49 * sizeof(float) / sizeof(acc_t);  // of a block at most: as its shared memory allows

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

// One axis of a bin.
template <typename acc_t>
struct BinStencil : AxisStencil<acc_t, FixedVector<StencilEntry<acc_t>, 2 * kChunk>> {
  int64_t plane, offset_index;  // plane: its first element in the map
  acc_t share, factor, move;    // share: 1 / samples; factor: the mask, of the rows only
  int chunks;
};

// A pixel of a bin: where it lies in the map's plane, counted in vectors; its weight, and what that changes by when the
// bin moves
template <typename acc_t, bool slopes>
struct alignas(2 * sizeof(acc_t)) Visit {
  uint32_t place;
  acc_t weight;
};
template <typename acc_t>
struct alignas(4 * sizeof(acc_t)) Visit<acc_t, true> {
  uint32_t place;
  acc_t weight, by_y, by_x;
};

// What a launch is about.
template <typename acc_t, typename shape_t>
struct PoolTask {
  shape_t shape;
  PoolSizes s;
  PoolArguments<acc_t> arguments;
  const acc_t* mask;             // [K, 1, Ph, Pw] or null
  int channels, size, all_bins;  // `size`: channels of a class
  // The bins of a box are shared out to blocks, `bins` to each. In shared memory those of a channel lie `pitch`
  // elements from those of the next, an odd number against bank conflicts; 0 for a tensor that is channels last.
  int bins, pitch;
  bool several;  // whether the samples of an axis may be more than a chunk
};

// The pixels that one chunk of the samples of a bin touches.
template <typename acc_t, typename shape_t>
__device__ __forceinline__ void locate_pixels(
    BinStencil<acc_t>& to, const PoolTask<acc_t, shape_t>& task, int k, int klass, int bin, bool is_y, int chunk) {
  const PoolSizes& s = task.s;
  const int across = s.pooled_w;
  const PoolAxis<acc_t> at = locate_axis(task.shape, task.arguments, k, bin / across, bin % across, klass, is_y);
  // A box of no image has no samples: to raise an error, the CPU would have to wait for the GPU.
  const acc_t image = task.arguments.boxes[k * int64_t(5)], reach = static_cast<acc_t>(s.reach);
  const int64_t first = at.axis.first, last = image >= 0 && image < acc_t(s.batch) ? at.axis.last : first;
  const int64_t begin = first + chunk * int64_t(kChunk), extent = is_y ? s.height : s.width;
  to.locate(at.axis, begin, begin + kChunk < last ? begin + kChunk : last, extent, reach);
  to.chunks = (last - first + kChunk - 1) / kChunk;
  to.plane = at.plane * s.pixels() * s.channels, to.offset_index = at.offset_index, to.move = at.move;
  acc_t samples = at.samples;
  if (samples == 0) samples = acc_t(to.samples);
  if (at.samples == 0 && to.chunks > 1) {
    AxisSample<acc_t, int32_t> sample;
    samples = 0;
    for (int64_t i = first; i < last; ++i) samples += clamp_to_axis(at.axis.at(i), int32_t(extent), reach, sample);
  }
  to.share = 1 / samples;
  to.factor = is_y && task.mask ? task.mask[k * s.bins() + bin] : acc_t(1);
}

// Puts the next chunk into the stencils of a bin, after the last one the first again. By all lanes of a warp. Not
// inlined: its registers would be missing elsewhere.
template <typename acc_t, typename shape_t>
__device__ __noinline__ int locate_next_chunk(
    BinStencil<acc_t> (&stencils)[2], const PoolTask<acc_t, shape_t>& task, int k, int klass, int bin, int chunk) {
  const int across = stencils[1].chunks, next = (chunk + 1) % (stencils[0].chunks * across);
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  if (lane < 2)
    locate_pixels(stencils[lane], task, k, klass, bin, lane == 0, lane == 0 ? next / across : next % across);
  __syncwarp();
  return next;
}

// What a block of threads knows of its box.
// `vec`: channels of the vectors in which the map is read
template <int vec, typename acc_t, bool slopes, typename shape_t>
struct PoolBlock {
  struct Shared {
    BinStencil<acc_t> stencils[kBins<acc_t>][2];  // rows, columns
    Visit<acc_t, slopes> visits[kWarps][kWarp];
  };

  const PoolTask<acc_t, shape_t>& task;
  Shared& shared;
  int k, klass, first, count;  // box, class, its bins
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  __device__ PoolBlock(const PoolTask<acc_t, shape_t>& task_, Shared& shared_) : task(task_), shared(shared_) {
    k = blockIdx.x, klass = blockIdx.z, first = blockIdx.y * task.bins;
    count = task.all_bins - first < task.bins ? task.all_bins - first : task.bins;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * count; i += kThreads) {
      const bool is_y = i < count;
      const int bin = is_y ? i : i - count;
      locate_pixels(shared.stencils[bin][!is_y], task, k, klass, first + bin, is_y, 0);
    }
    __syncthreads();
  }

  // Where a box's channels of a tensor [K, channels, Ph, Pw] lie: those of one bin if it is channels last.
  __device__ int64_t place(int bin, int channel) const {
    const int c = klass * task.size + channel, b = first + bin;
    const int64_t box = static_cast<int64_t>(task.channels) * task.all_bins * k;
    return box + (task.pitch == 0 ? static_cast<int64_t>(b) * task.channels + c
                                  : static_cast<int64_t>(c) * task.all_bins + b);
  }

  template <int pixels, typename load_t, typename use_t>
  __device__ __forceinline__ void take(const Visit<acc_t, slopes>* from, const load_t& load, const use_t& use) {
    Visit<acc_t, slopes> visits[pixels];
    decltype(load(0)) loaded[pixels];
#pragma unroll
    for (int i = 0; i < pixels; ++i) visits[i] = from[i];
#pragma unroll
    for (int i = 0; i < pixels; ++i) loaded[i] = load(visits[i].place);
#pragma unroll
    for (int i = 0; i < pixels; ++i) use(loaded[i], visits[i]);
  }

  // Calls fn(bin, whether its samples may be several chunks) for each bin of this warp.
  template <typename fn_t>
  __device__ __forceinline__ void for_each_bin(const fn_t& fn) {
    const auto each = [&](auto several) {
#pragma unroll 1
      for (int bin = warp; bin < count; bin += kWarps) fn(bin, several);
    };
    if (task.several) {
      each(std::true_type());
    } else {
      each(std::false_type());
    }
  }

  // Calls load(place) for several pixels of a bin, and then use(what it gave, visit) for each, until all have had their
  // turn. False if there is no pixel. All lanes of a warp must come here.
  template <bool several, typename load_t, typename use_t>
  __device__ __forceinline__ bool for_each_pixel(int bin, const load_t& load, const use_t& use) {
    constexpr int columns_listed = 2 * kChunk, rows_listed = kWarp / columns_listed;
    const BinStencil<acc_t>&rows = shared.stencils[bin][0], &columns = shared.stencils[bin][1];
    Visit<acc_t, slopes>* const visits = shared.visits[warp];
    const acc_t share = rows.share * columns.share * (slopes ? acc_t(1) : rows.factor);
    bool any = false;
    int chunk = 0;
    do {
      const int down = rows.entries.size(), width = columns.entries.size(), j = lane % columns_listed;
      for (int top = 0; top < down; top += rows_listed) {
        const int i = top + lane / columns_listed, n = (down - top < rows_listed ? down - top : rows_listed) * width;
        __syncwarp();
        if (i < down && j < width) {
          const StencilEntry<acc_t>&row = rows.entries[i], &column = columns.entries[j];
          Visit<acc_t, slopes> visit;
          visit.place = (row.pixel * static_cast<uint32_t>(task.s.width) + column.pixel) *
                        (static_cast<uint32_t>(task.channels) / vec);
          visit.weight = share * row.weight * column.weight;
          if constexpr (slopes) {
            visit.by_y = share * row.slope * column.weight;
            visit.by_x = share * row.weight * column.slope;
          }
          visits[(i - top) * width + j] = visit;
        }
        __syncwarp();
        any |= n > 0;
        int v = 0;
#pragma unroll 1
        for (; v + kAtOnce <= n; v += kAtOnce) take<kAtOnce>(visits + v, load, use);
        if (n & 2) take<2>(visits + v, load, use), v += 2;
        if (n & 1) take<1>(visits + v, load, use);
      }
      if (several && rows.chunks * columns.chunks > 1)
        chunk = locate_next_chunk(shared.stencils[bin], task, k, klass, first + bin, chunk);
    } while (chunk != 0);
    return any;
  }
};
static_assert(kAtOnce == 4, "what is left is at most 2 + 1 pixels");

// to [rows][columns] = from, whose rows begin so many elements apart; by all threads of the block
template <int vec, typename scalar_t>
__device__ __forceinline__ void copy_rows(
    scalar_t* to, int64_t to_pitch, const scalar_t* from, int64_t from_pitch, int rows, int columns) {
  if (vec > 1 && to_pitch == columns && from_pitch == columns) {
    const scalar_t* const end = from + rows * columns;
    to += threadIdx.x * vec;
#pragma unroll 1
    for (from += threadIdx.x * vec; from < end; from += kThreads * vec, to += kThreads * vec) {
      *reinterpret_cast<Raw<vec, scalar_t>*>(to) = load_raw<vec>(from);
    }
  } else {
    for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) {
      for (int i = threadIdx.x % kWarp; i < columns; i += kWarp) to[row * to_pitch + i] = from[row * from_pitch + i];
    }
  }
}

// out [K, channels, Ph, Pw], map [N, groups, H, W, channels]
template <int vec, typename scalar_t, typename acc_t, typename shape_t>
__global__ void __launch_bounds__(kThreads, 3) pool_kernel(
    scalar_t* __restrict__ out, const scalar_t* __restrict__ map,
    const __grid_constant__ PoolTask<acc_t, shape_t> task) {
  extern __shared__ __align__(16) unsigned char memory[];
  scalar_t* const staged = reinterpret_cast<scalar_t*>(memory);
  __shared__ typename PoolBlock<vec, acc_t, false, shape_t>::Shared shared;
  PoolBlock<vec, acc_t, false, shape_t> block(task, shared);
  const int size = task.size;
  for (int slice = 0; slice < size; slice += kWarp * vec) {
    const int c = slice + block.lane * vec;
    const bool exists = c < size;
    scalar_t* const place = out + block.place(0, c);
    scalar_t* const box = staged + block.lane * vec * task.pitch;
    // A lane too many reads what another one does.
    const scalar_t* from = map + block.klass * size + (exists ? c : size - vec);
    block.for_each_bin([&](int bin, auto several) {
      const scalar_t* plane = from + shared.stencils[bin][0].plane;
      acc_t sum[vec] = {};
      block.template for_each_pixel<several()>(
          bin, [&](uint32_t place) { return reinterpret_cast<const Raw<vec, scalar_t>*>(plane)[place]; },
          [&](const auto& raw, const auto& visit) {
            acc_t value[vec];
            unpack<scalar_t>(value, raw);
#pragma unroll
            for (int e = 0; e < vec; ++e) sum[e] += visit.weight * value[e];
          });
      if (!exists) return;
      if (task.pitch == 0) {
        store(place + static_cast<int64_t>(bin) * task.channels, sum);
      } else {
#pragma unroll
        for (int e = 0; e < vec; ++e) box[e * task.pitch + bin] = static_cast<scalar_t>(sum[e]);
      }
    });
    if (task.pitch == 0) continue;
    __syncthreads();
    copy_rows<vec>(
        out + block.place(0, slice), task.all_bins, staged, task.pitch,
        size - slice < kWarp * vec ? size - slice : kWarp * vec, block.count);
    __syncthreads();
  }
}

// grad as `out` above. map_grad [N, groups, H, W, channels], offset_grad and mask_grad, each null if not wanted, are
// added to; of the latter two one lane of a warp adds the sum over its channels.
template <int vec, typename scalar_t, typename acc_t, typename shape_t>
__global__ void __launch_bounds__(kThreads, 2) pool_backward_kernel(
    acc_t* __restrict__ map_grad, acc_t* __restrict__ offset_grad, acc_t* __restrict__ mask_grad,
    const scalar_t* __restrict__ grad, const scalar_t* __restrict__ map,
    const __grid_constant__ PoolTask<acc_t, shape_t> task) {
  // Lanes add to neighbouring vectors of 16 bytes: a lane's channels are `pieces` runs of `run`.
  constexpr int run = vec * sizeof(acc_t) > 16 ? 16 / sizeof(acc_t) : vec, pieces = vec / run;
  extern __shared__ __align__(16) unsigned char memory[];
  scalar_t* const staged = reinterpret_cast<scalar_t*>(memory);
  __shared__ typename PoolBlock<run, acc_t, true, shape_t>::Shared shared;
  PoolBlock<run, acc_t, true, shape_t> block(task, shared);
  const int size = task.size;
  struct Pieces {
    Raw<run, scalar_t> at[pieces];
  };
  for (int slice = 0; slice < size; slice += kWarp * vec) {
    const int channels = size - slice < kWarp * vec ? size - slice : kWarp * vec;
    if (task.pitch != 0) {
      __syncthreads();
      copy_rows<vec>(staged, task.pitch, grad + block.place(0, slice), task.all_bins, channels, block.count);
      __syncthreads();
    }
    int channel[pieces];  // of the class
    bool exists[pieces];
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      channel[i] = slice + (i * kWarp + block.lane) * run;
      exists[i] = channel[i] < size;
      if (!exists[i]) channel[i] = size - run;  // a lane too many reads what another one does
    }
    block.for_each_bin([&](int bin, auto several) {
      const BinStencil<acc_t>&rows = shared.stencils[bin][0], &columns = shared.stencils[bin][1];
      const int64_t plane = rows.plane + block.klass * size;
      acc_t g[pieces][run], by_y = 0, by_x = 0, by_mask = 0;
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        if (task.pitch == 0) {
          load(g[i], grad + block.place(bin, channel[i]));
        } else {
#pragma unroll
          for (int e = 0; e < run; ++e) {
            g[i][e] = static_cast<acc_t>(staged[(channel[i] - slice + e) * task.pitch + bin]);
          }
        }
      }
      const bool any = block.template for_each_pixel<several()>(
          bin,
          [&](uint32_t place) {
            Pieces loaded;
            if (offset_grad || mask_grad) {
#pragma unroll
              for (int i = 0; i < pieces; ++i) {
                loaded.at[i] = reinterpret_cast<const Raw<run, scalar_t>*>(map + plane + channel[i])[place];
              }
            }
            return loaded;
          },
          [&](const Pieces& loaded, const Visit<acc_t, true>& visit) {
            acc_t dot = 0;
#pragma unroll
            for (int i = 0; i < pieces; ++i) {
              if (!exists[i]) continue;
              const acc_t weight = rows.factor * visit.weight;
              if (map_grad && weight != 0) {
                atomic_add(map_grad + plane + channel[i] + static_cast<uint64_t>(visit.place) * run, weight, g[i]);
              }
              acc_t value[run];
              unpack<scalar_t>(value, loaded.at[i]);
#pragma unroll
              for (int e = 0; e < run; ++e) dot += g[i][e] * value[e];
            }
            by_y += visit.by_y * dot;
            by_x += visit.by_x * dot;
            by_mask += visit.weight * dot;
          });
      if (!offset_grad && !mask_grad) return;
      by_y = lane_sum(by_y, kWarp);
      by_x = lane_sum(by_x, kWarp);
      by_mask = lane_sum(by_mask, kWarp);
      // A bin without pixels may be of a box of infinite size, which times 0 would be NaN.
      if (block.lane != 0 || !any) return;
      if (offset_grad) {
        atomicAdd(offset_grad + columns.offset_index, rows.factor * columns.move * by_x);
        atomicAdd(offset_grad + rows.offset_index, rows.factor * rows.move * by_y);
      }
      if (mask_grad) atomicAdd(mask_grad + static_cast<int64_t>(block.k) * task.all_bins + block.first + bin, by_mask);
    });
  }
}

// The tensors of one call in the types and layouts that the kernels want.
template <typename scalar_t, typename acc_t, typename shape_t>
struct PoolCall {
  const shape_t& shape;
  const PoolSizes s;
  const at::Tensor boxes, offset, mask;  // contiguous, acc_t; offset and mask may be undefined
  at::Tensor map;                        // [N, groups, H, W, channels]

  static constexpr auto acc_type = c10::CppTypeToScalarType<acc_t>::value;

  static at::Tensor arranged(const std::optional<at::Tensor>& t) {
    return t.has_value() ? t->to(acc_type).contiguous() : at::Tensor();
  }

  static const acc_t* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<acc_t>() : nullptr; }

  PoolCall(
      const shape_t& shape_, const at::Tensor& input, const at::Tensor& boxes_,
      const std::optional<at::Tensor>& offset_, const std::optional<at::Tensor>& mask_)
      : shape(shape_), s(shape.sizes()), boxes(arranged(boxes_)), offset(arranged(offset_)), mask(arranged(mask_)) {
    map = s.groups == 1 ? to_rows<scalar_t>(input)
                        // input channel c * groups + g is channel c of plane g
                        : input.reshape({s.batch, s.channels, s.groups, s.pixels()}).permute({0, 2, 3, 1}).contiguous();
  }

  // Calls fn(vec, task, grid, bytes), unless there is nothing to do; `pooled` [K, channels, Ph, Pw] is dense.
  template <typename fn_t>
  void launch(const at::Tensor& pooled, const fn_t& fn) const {
    const int64_t size = s.channels / s.classes, parts = (s.bins() + kBins<acc_t> - 1) / kBins<acc_t>;
    if (s.boxes == 0 || size == 0) return;
    constexpr int most = std::numeric_limits<int>::max() / 8, most_blocks = 65535;
    TORCH_CHECK(
        std::max({s.channels, s.bins(), shape.sampling_ratio}) < most && std::max(parts, s.classes) <= most_blocks,
        s.op, ": too many channels, bins, samples or classes");
    const int bins = (s.bins() + parts - 1) / parts;
    const int pitch = pooled.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? 0 : bins | 1;
    const PoolTask<acc_t, shape_t> task{
        shape,
        s,
        {data(boxes), data(offset)},
        data(mask),
        static_cast<int>(s.channels),
        static_cast<int>(size),
        static_cast<int>(s.bins()),
        bins,
        pitch,
        shape.sampling_ratio <= 0 || shape.sampling_ratio > kChunk};
    const dim3 grid(blocks_for(s.boxes, 1), parts, s.classes);
    const bool aligned = reinterpret_cast<uintptr_t>(pooled.const_data_ptr()) % 16 == 0;
    dispatch_vector<scalar_t>(aligned ? size : 1, map.const_data_ptr(), [&](auto vec) {
      constexpr int64_t vectors = std::numeric_limits<uint32_t>::max();
      TORCH_CHECK(s.pixels() * (s.channels / vec()) <= vectors, s.op, ": input is too large an image");
      fn(vec, task, grid, kWarp * vec() * pitch * sizeof(scalar_t));
    });
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
  const PoolCall<scalar_t, acc_t, shape_t> call(shape, input, boxes, offset, mask);
  const at::Tensor pooled = at::empty(
      {call.s.boxes, call.s.channels, call.s.pooled_h, call.s.pooled_w},
      input.options().memory_format(input.suggest_memory_format()));
  call.launch(pooled, [&](auto vec, const auto& task, dim3 grid, size_t bytes) {
    pool_kernel<vec(), scalar_t, acc_t, shape_t><<<grid, kThreads, bytes, stream>>>(
        pooled.data_ptr<scalar_t>(), call.map.template const_data_ptr<scalar_t>(), task);
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
  const PoolCall<scalar_t, acc_t, shape_t> call(shape, input, boxes, offset, mask);
  const at::Tensor grad = grad_.contiguous(grad_.suggest_memory_format());
  const at::TensorOptions acc_options = call.boxes.options();
  wanted[1] = wanted[1] && offset.has_value();
  wanted[2] = wanted[2] && mask.has_value();
  const at::Tensor none = at::empty({0}, input.options());
  const at::Tensor map_grad =
      wanted[0] ? at::zeros({call.s.batch, call.s.groups, call.s.pixels(), call.s.channels}, acc_options) : none;
  const at::Tensor offset_grad = wanted[1] ? at::zeros(offset->sizes(), acc_options) : none;
  const at::Tensor mask_grad = wanted[2] ? at::zeros(mask->sizes(), acc_options) : none;
  call.launch(grad, [&](auto vec, const auto& task, dim3 grid, size_t bytes) {
    pool_backward_kernel<vec(), scalar_t, acc_t, shape_t><<<grid, kThreads, bytes, stream>>>(
        wanted[0] ? map_grad.data_ptr<acc_t>() : nullptr, wanted[1] ? offset_grad.data_ptr<acc_t>() : nullptr,
        wanted[2] ? mask_grad.data_ptr<acc_t>() : nullptr, grad.const_data_ptr<scalar_t>(),
        call.map.template const_data_ptr<scalar_t>(), task);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {
      wanted[0] ? call.to_input(map_grad, input) : none, wanted[1] ? offset_grad.to(offset->scalar_type()) : none,
      wanted[2] ? mask_grad.to(mask->scalar_type()) : none};
}

// For RoIPoolOperators
struct Pooling {
  template <typename scalar_t, typename acc_t, typename... arguments_t>
  static auto forward(const arguments_t&... arguments) {
    return pool_forward<scalar_t, acc_t>(arguments...);
  }
  template <typename scalar_t, typename acc_t, typename... arguments_t>
  static auto backward(const arguments_t&... arguments) {
    return pool_backward<scalar_t, acc_t>(arguments...);
  }
  // By atomics
  static void sums_in_any_order(const std::string& name) {
    at::globalContext().alertNotDeterministic((name + "_cuda").c_str());
  }
};

}  // namespace dcnv2::cuda
