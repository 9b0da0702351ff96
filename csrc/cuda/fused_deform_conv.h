// Deformable convolution of half types on the matrix units of a GPU, forward, without columns in memory.
//
// A block of threads makes a tile of the output: kTilePixels pixels and `outputs` channels of one group. It walks over
// the taps and their channels, kDepth at a time: that part of the columns is sampled into shared memory and multiplied
// there, while the neighbours and the weights of the next part are on their way from memory. Each thread samples eight
// channels of one pixel, so that it finds a position and its weights once a tap.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/channels_last.h"
#include "cuda/matrix_unit.h"
#include "deform_conv.h"

namespace dcnv2::cuda {

constexpr int kTilePixels = 64, kDepth = 32;
constexpr int kRowSize = kDepth + 8;  // in shared memory: eight rows that load_matrices reads lie in different banks
constexpr int kHalves = 8;            // in 16 bytes
static_assert(kThreads == kTilePixels * kDepth / kHalves, "each thread samples one vector");

template <typename scalar_t, int outputs>
struct FusedTile {
  // Twice: one is multiplied while the other is filled.
  scalar_t columns[2][kTilePixels][kRowSize];
  scalar_t weights[2][outputs][kRowSize];
};

// output [N * Ho * Wo, O] = bias + columns * weights, of a map [N, H * W, C]
// offset [N, 2 * G * taps, Ho, Wo], mask [N, G * taps, Ho, Wo] or null, weights [groups, O / groups, taps * C /
// groups], bias [O] or null
template <int outputs, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 256 / outputs) fused_kernel(
    scalar_t* __restrict__ output, const scalar_t* __restrict__ map, const float* __restrict__ offset,
    const float* __restrict__ mask, const scalar_t* __restrict__ weights, const scalar_t* __restrict__ bias,
    const DeformConvShape s) {
  using Halves = Vector<uint32_t, kHalves / 2>;  // pairs: single ones would be unpacked, and so waited for, too early
  extern __shared__ __align__(16) unsigned char memory[];
  auto& tile = *reinterpret_cast<FusedTile<scalar_t, outputs>*>(memory);

  // The tile, and what of its columns and weights this thread fetches: a vector of a row, `place` channels into it.
  const int group_outputs = s.out_channels / s.groups, across = (group_outputs + outputs - 1) / outputs;
  const int strips = s.groups * across, group = blockIdx.x % strips / across;
  const int first_output = blockIdx.x % across * outputs, thread = threadIdx.x;
  const int line = thread / (kDepth / kHalves), place = thread % (kDepth / kHalves) * kHalves;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / strips) * kTilePixels, rows = s.batch * s.out_pixels();
  const bool exists = first_row + line < rows;
  const int image = (first_row + line) / s.out_pixels(), pixel = (first_row + line) % s.out_pixels();

  // Where the next fetch is: a tap, and channels from `channel` on.
  const int first_channel = group * (s.in_channels / s.groups), end_channel = first_channel + s.in_channels / s.groups;
  const int offset_group_size = s.in_channels / s.offset_groups;
  int tap = 0, channel = first_channel, offset_group_end = 0;
  int neighbours[4] = {-1, -1, -1, -1};  // pixels of the image's map, or -1 for one that counts as zero
  float sample_weights[4] = {};
  const int64_t weight_row = s.taps() * (s.in_channels / s.groups);
  const scalar_t* weight = weights + (group * group_outputs + first_output + line) * weight_row + place;

  const scalar_t* at = map + image * s.in_pixels() * s.in_channels + place;

  constexpr int kWeightRows = outputs / kTilePixels;
  Halves values[4], fetched[kWeightRows];
  const auto fetch = [&] {
    if (exists && (channel == first_channel || channel == offset_group_end)) {
      const int offset_group = channel / offset_group_size, out_w = s.out_width, kernel_w = s.kernel_w;
      offset_group_end = (offset_group + 1) * offset_group_size;
      const auto sample = locate_sample(
          s, offset, mask, (image * s.offset_groups + offset_group) * s.taps() + tap, pixel,
          s.tap_y(pixel / out_w, tap / kernel_w), s.tap_x(pixel % out_w, tap % kernel_w));
      sample.column_weights(sample_weights);
#pragma unroll
      for (int n = 0; n < 4; ++n) neighbours[n] = sample.index[n] < s.in_pixels() ? sample.index[n] : -1;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      values[n] = {};
      if (neighbours[n] >= 0) {
        values[n] = *reinterpret_cast<const Halves*>(at + neighbours[n] * s.in_channels + channel);
      }
    }
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      fetched[i] = {};
      if (first_output + line + i * kTilePixels < group_outputs) {
        fetched[i] = *reinterpret_cast<const Halves*>(weight + i * kTilePixels * weight_row);
      }
    }
    weight += kDepth;
    channel += kDepth;
    if (channel == end_channel) channel = first_channel, ++tap;
  };
  const auto put = [&](int stage) {
    float column[kHalves] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      scalar_t halves[kHalves];
      std::memcpy(halves, &values[n], sizeof(halves));
#pragma unroll
      for (int e = 0; e < kHalves; ++e) column[e] += sample_weights[n] * static_cast<float>(halves[e]);
    }
    store(&tile.columns[stage][line][place], column);
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      *reinterpret_cast<Halves*>(&tile.weights[stage][line + i * kTilePixels][place]) = fetched[i];
    }
  };

  // Of the eight warps two share the tile's pixels and four its channels.
  constexpr int kAcross = outputs / 4 / 16;  // pairs of 8 channels of a warp
  const int warp = thread / kWarp, lane = thread % kWarp, warp_row = warp / 4 * 32,
            warp_output = warp % 4 * kAcross * 16;
  float sums[2][2 * kAcross][4] = {};
  const auto multiply = [&](int stage) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(a[i], &tile.columns[stage][warp_row + i * 16 + lane % 16][k + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        load_matrices(b, &tile.weights[stage][warp_output + j * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<scalar_t>(sums[i][2 * j], a[i], b[0], b[1]);
          multiply_add<scalar_t>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  };

  const int steps = weight_row / kDepth;
  fetch();
  put(0);
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) fetch();
    multiply(step % 2);
    if (more) put((step + 1) % 2);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kAcross; ++j) {
      const int o = first_output + warp_output + j * 8 + lane % 4 * 2;
      if (o >= group_outputs) continue;
      const int64_t out_channel = group * group_outputs + o;
      float added[2] = {0, 0};
      if (bias) load(added, bias + out_channel);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t out_row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
        if (out_row >= rows) continue;
        const float result[2] = {sums[i][j][2 * half] + added[0], sums[i][j][2 * half + 1] + added[1]};
        store(output + out_row * s.out_channels + out_channel, result);
      }
    }
  }
}

// Whether the kernel can take a call. `map` and `weights` are those of the kernel, the bias has O elements.
template <typename scalar_t>
bool can_fuse(const DeformConvShape& s, const at::Tensor& map, const at::Tensor& weights, const at::Tensor& bias) {
  const auto aligned = [](const at::Tensor& t) {
    return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  // Not the GPU's own capability: it may run what was compiled for an older one.
  cudaFuncAttributes compiled;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, fused_kernel<128, scalar_t>));
  return compiled.ptxVersion >= 80 && s.in_channels / s.groups % kDepth == 0 &&
         s.in_channels / s.offset_groups % kDepth == 0 && s.out_channels / s.groups % kHalves == 0 &&
         std::max({s.batch, s.taps() * s.in_channels, s.out_channels, s.out_pixels()}) <
             std::numeric_limits<int>::max() &&
         aligned(map) && aligned(weights) && aligned(bias);
}

template <typename scalar_t>
void fused_forward(
    const at::Tensor& output, const DeformConvShape& s, const scalar_t* map, const float* offset, const float* mask,
    const scalar_t* weights, const scalar_t* bias) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t group_outputs = s.out_channels / s.groups;
  const auto launch = [&](auto outputs) {
    constexpr int bytes = sizeof(FusedTile<scalar_t, outputs()>);
    const int64_t tiles = (s.batch * s.out_pixels() + kTilePixels - 1) / kTilePixels;
    const int64_t across = (group_outputs + outputs() - 1) / outputs();
    if (tiles == 0) return;
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(fused_kernel<outputs(), scalar_t>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    fused_kernel<outputs(), scalar_t><<<blocks_for(tiles * s.groups * across, 1), kThreads, bytes, stream>>>(
        output.data_ptr<scalar_t>(), map, offset, mask, weights, bias, s);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // Wide tiles sample less often, narrow ones leave more of a multiprocessor to other blocks. Not tuned yet.
  if (group_outputs > 128) {
    launch(std::integral_constant<int, 256>());
  } else {
    launch(std::integral_constant<int, 128>());
  }
}

}  // namespace dcnv2::cuda
