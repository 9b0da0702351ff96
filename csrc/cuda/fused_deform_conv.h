// Deformable convolution of half types on the matrix units of a GPU, forward, without columns in memory.
//
// A block of threads makes a patch of the output: 8 x 16 pixels, whose neighbours overlap and so stay in the L1 cache,
// and `outputs` channels of one group. It finds the positions and weights of all taps once, in shared memory, and then
// walks over the channels, kDepth at a time, and for each of them over the taps. A warp takes 16 pixels. The order in
// which a matrix product sums is free, and so is that of its columns: they are chosen such that the 8 channels that a
// lane samples, 16 bytes, are its part of the left matrix, and that it holds 8 neighbouring outputs at the end. The
// weights come through kStages buffers in shared memory. Where there are fewer blocks than multiprocessors, several
// share the channels of a patch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/channels_last.h"
#include "cuda/matrix_unit.h"
#include "deform_conv.h"

namespace dcnv2::cuda {

constexpr int kPatchHeight = 8, kPatchWidth = 16, kPatch = kPatchHeight * kPatchWidth;
constexpr int kDepth = 32, kHalves = 8;  // channels of a step, and in 16 bytes
constexpr int kTaps = 9;                 // in the table at once
constexpr int kStages = 3;
static_assert(kThreads / kWarp == kPatchHeight && kPatchWidth == 16, "a warp takes a row of the patch");

struct alignas(16) TableEntry {
  int neighbour[4];  // vectors of 8 channels from the first of the image, -1 for a neighbour that counts as zero
  float weight[4];
};

template <typename scalar_t, int outputs>
struct FusedTile {
  TableEntry table[kTaps][kPatch];
  scalar_t weights[kStages][outputs][kDepth];
};

// out [parts, N * Ho * Wo, O] = columns * weights, of a map [N, H * W, C]; each part sums its share of the channels
// offset [N, 2 * G * taps, Ho, Wo], mask [N, G * taps, Ho, Wo] or nothing, weights [groups, O / groups, taps *
// C / groups]
template <int outputs, typename scalar_t, typename out_t>
__global__ void __launch_bounds__(kThreads, 256 / outputs) fused_kernel(
    out_t* __restrict__ out, const scalar_t* __restrict__ map, const AnyTensor offset, const AnyTensor mask,
    const scalar_t* __restrict__ weights, const DeformConvShape s) {
  using Halves = Raw<kHalves, scalar_t>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& tile = *reinterpret_cast<FusedTile<scalar_t, outputs>*>(memory);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, row = lane / 4, quarter = lane % 4;

  const int group_outputs = s.out_channels / s.groups, strips = (group_outputs + outputs - 1) / outputs;
  const int first_output = blockIdx.x % strips * outputs, group = blockIdx.x / strips % s.groups;
  const int across = (s.out_width + kPatchWidth - 1) / kPatchWidth;
  const int down = (s.out_height + kPatchHeight - 1) / kPatchHeight;
  const int patch = blockIdx.x / (strips * static_cast<int>(s.groups)), image = patch / (across * down);
  const int top = patch / across % down * kPatchHeight, left = patch % across * kPatchWidth;
  const int depth = s.in_channels / s.groups, all_taps = s.taps(), group_size = s.in_channels / s.offset_groups;
  const int chunks = depth / kDepth, share = (chunks + gridDim.y - 1) / gridDim.y, first_chunk = blockIdx.y * share;
  const int end_chunk = first_chunk + share < chunks ? first_chunk + share : chunks;
  const scalar_t* const from = map + image * s.in_pixels() * s.in_channels + group * depth + quarter * kHalves;

  float sums[outputs / 8][4] = {};
  // As many channels as share their offsets, and as many taps as the table holds, at a time.
  for (int chunk = first_chunk, next; chunk < end_chunk; chunk = next) {
    const int offset_group = (group * depth + chunk * kDepth) / group_size;
    next = ((offset_group + 1) * group_size - group * depth) / kDepth;
    if (next > end_chunk) next = end_chunk;
    for (int first_tap = 0; first_tap < all_taps; first_tap += kTaps) {
      const int taps = all_taps - first_tap < kTaps ? all_taps - first_tap : kTaps, steps = (next - chunk) * taps;
      __syncthreads();
      for (int i = thread; i < taps * kPatch; i += kThreads) {
        const int tap = first_tap + i / kPatch, y = top + i % kPatch / kPatchWidth, x = left + i % kPatchWidth;
        TableEntry entry = {{-1, -1, -1, -1}, {}};
        if (y < s.out_height && x < s.out_width) {
          const int plane = offset_group * all_taps + tap;
          const auto sample = locate_sample<float>(
              s, s.tap_y(y, tap / static_cast<int>(s.kernel_w)), s.tap_x(x, tap % static_cast<int>(s.kernel_w)),
              offset.at<float>(image, 2 * plane, y, x), offset.at<float>(image, 2 * plane + 1, y, x),
              mask.data ? mask.at<float>(image, plane, y, x) : 1.f);
          sample.column_weights(entry.weight);
          for (int n = 0; n < 4; ++n) {
            const int at = sample.index[n] * static_cast<int>(s.in_channels / kHalves);
            entry.neighbour[n] = sample.index[n] < s.in_pixels() ? at : -1;
          }
        }
        tile.table[i / kPatch][i % kPatch] = entry;
      }

      // The weights of a step: a thread copies one vector of every kLines-th output.
      constexpr int kLines = kThreads * kHalves / kDepth;
      const int line = thread / (kDepth / kHalves), place = thread % (kDepth / kHalves) * kHalves;
      const scalar_t* weight =
          weights + (static_cast<int64_t>(group * group_outputs + first_output + line) * all_taps + first_tap) * depth +
          chunk * kDepth + place;
      int copied = 0, copy_tap = 0, copy_stage = 0;
      const auto prefetch = [&] {
        if (copied++ < steps) {
#pragma unroll
          for (int i = 0; i < outputs / kLines; ++i) {
            copy_async(
                &tile.weights[copy_stage][line + i * kLines][place], weight + i * kLines * all_taps * depth,
                first_output + line + i * kLines < group_outputs);
          }
          weight += depth;
          if (++copy_tap == taps) copy_tap = 0, weight += kDepth - taps * depth;
        }
        end_copies();
        copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
      };

      const TableEntry* const entries = &tile.table[0][warp * 16 + row];
      const auto* channels = reinterpret_cast<const Halves*>(from + chunk * kDepth);
      Halves raw[2][4];  // the neighbours of the pixels `row` and `row` + 8
      int fetch_tap = 0, tap = 0, stage = 0;
      const auto fetch = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const TableEntry& entry = entries[fetch_tap * kPatch + half * 8];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int at = entry.neighbour[n];
            raw[half][n] = {};
            if (at >= 0) raw[half][n] = channels[static_cast<unsigned>(at)];
          }
        }
        if (++fetch_tap == taps) fetch_tap = 0, channels += kDepth / kHalves;
      };
      uint32_t a[2][4];  // of the two products of 16 channels
      const auto interpolate = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const TableEntry& entry = entries[tap * kPatch + half * 8];
          float column[kHalves] = {};
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float value[kHalves];
            unpack<scalar_t>(value, raw[half][n]);
#pragma unroll
            for (int e = 0; e < kHalves; ++e) column[e] += entry.weight[n] * value[e];
          }
          const Halves pairs = pack<scalar_t>(column);
          a[0][half] = pairs.x, a[0][2 + half] = pairs.y, a[1][half] = pairs.z, a[1][2 + half] = pairs.w;
        }
        tap = tap + 1 == taps ? 0 : tap + 1;
      };

      for (int i = 0; i < kStages - 1; ++i) prefetch();
      __syncthreads();
      fetch();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        prefetch();
        interpolate();
        if (step + 1 < steps) fetch();
        // Of 32 outputs a lane gets 8 neighbouring ones: product j has the outputs 2 * j and 2 * j + 1 of each lane.
        const scalar_t* const b = &tile.weights[stage][row / 2 * 8 + row % 2][quarter * kHalves];
        stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
        for (int j = 0; j < outputs / 8; ++j) {
          const Halves pairs = load_raw<kHalves>(b + (j / 4 * 32 + j % 4 * 2) * kDepth);
          multiply_add<scalar_t>(sums[j], a[0], pairs.x, pairs.y);
          multiply_add<scalar_t>(sums[j], a[1], pairs.z, pairs.w);
        }
      }
    }
  }

  const int64_t rows = s.batch * s.out_pixels(), y = top + warp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t x = left + half * 8 + row;
    if (y >= s.out_height || x >= s.out_width) continue;
    const int64_t pixel = blockIdx.y * rows + image * s.out_pixels() + y * s.out_width + x;
#pragma unroll
    for (int j = 0; j < outputs / 8; j += 4) {
      const int o = first_output + j * 8 + quarter * kHalves;
      if (o >= group_outputs) continue;
      // 16 bytes at a time
      constexpr int run = 16 / sizeof(out_t);
#pragma unroll
      for (int first = 0; first < kHalves; first += run) {
        float result[run];
#pragma unroll
        for (int e = 0; e < run; ++e) result[e] = sums[j + (first + e) / 2][half * 2 + e % 2];
        store(out + pixel * s.out_channels + group * group_outputs + o + first, result);
      }
    }
  }
}

// out [count] = the sum of parts [number, count]
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(scalar_t* __restrict__ out, const float* __restrict__ parts, int number, int64_t count) {
  constexpr int run = 4;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * run;
  if (i >= count) return;
  float sum[run] = {}, part[run];
  for (int n = 0; n < number; ++n) {
    load(part, parts + n * count + i);
#pragma unroll
    for (int e = 0; e < run; ++e) sum[e] += part[e];
  }
  store(out + i, sum);
}

// Whether the kernel can take a call. `map` and `weights` are those of the kernel.
template <typename scalar_t>
bool can_fuse(const DeformConvShape& s, const at::Tensor& map, const at::Tensor& weights) {
  // Not the GPU's own capability: it may run what was compiled for an older one.
  cudaFuncAttributes compiled;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, fused_kernel<128, scalar_t, scalar_t>));
  const auto aligned = [](const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
  return compiled.ptxVersion >= 80 && s.in_channels / s.groups % kDepth == 0 &&
         s.in_channels / s.offset_groups % kDepth == 0 && s.out_channels / s.groups % kHalves == 0 &&
         std::max(
             {s.batch * s.groups * s.out_channels, s.taps() * s.in_channels, s.out_pixels(),
              s.in_pixels() * (s.in_channels / kHalves)}) < std::numeric_limits<int>::max() &&
         aligned(map) && aligned(weights);
}

// output [N * Ho * Wo, O]
template <typename scalar_t>
void fused_forward(
    const at::Tensor& output, const DeformConvShape& s, const at::Tensor& map, const AnyTensor& offset,
    const AnyTensor& mask, const at::Tensor& weights) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (output.numel() == 0) return;
  int device, processors;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t patches = s.batch * ((s.out_height + kPatchHeight - 1) / kPatchHeight) *
                          ((s.out_width + kPatchWidth - 1) / kPatchWidth) * s.groups;
  const auto blocks = [&](int outputs) { return patches * ((s.out_channels / s.groups + outputs - 1) / outputs); };
  const auto launch = [&](auto outputs, auto* out, int64_t parts) {
    using out_t = std::remove_pointer_t<decltype(out)>;
    constexpr int bytes = sizeof(FusedTile<scalar_t, outputs()>);
    C10_CUDA_CHECK(cudaFuncSetAttribute(
        fused_kernel<outputs(), scalar_t, out_t>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const dim3 grid(blocks_for(blocks(outputs()), 1), parts);
    fused_kernel<outputs(), scalar_t, out_t><<<grid, kThreads, bytes, stream>>>(
        out, map.const_data_ptr<scalar_t>(), offset, mask, weights.const_data_ptr<scalar_t>(), s);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // Wide tiles sample less often, narrow ones make more blocks. Not tuned yet (docs/gpu.md).
  using std::integral_constant;
  if (s.out_channels / s.groups > 128 && blocks(256) >= processors) {
    return launch(integral_constant<int, 256>(), output.data_ptr<scalar_t>(), 1);
  }
  const int64_t parts = std::min(s.in_channels / s.groups / kDepth, processors / blocks(128));
  if (parts < 2) return launch(integral_constant<int, 128>(), output.data_ptr<scalar_t>(), 1);
  const at::Tensor sums = at::empty({parts, output.numel()}, output.options().dtype(at::kFloat));
  launch(integral_constant<int, 128>(), sums.data_ptr<float>(), parts);
  add_parts_kernel<scalar_t><<<blocks_for(output.numel(), kThreads * 4), kThreads, 0, stream>>>(
      output.data_ptr<scalar_t>(), sums.const_data_ptr<float>(), parts, output.numel());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace dcnv2::cuda
