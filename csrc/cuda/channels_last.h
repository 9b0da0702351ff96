// What the CUDA kernels share: maps laid out pixel by pixel, so that the neighbours of a sample are contiguous channel
// vectors, read 16 bytes at a time.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

namespace dcnv2::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kTile = 64;

// Calls fn(std::integral_constant<int, channels that are read at once>): 16 bytes where `aligned` channels and `data`
// allow it.
template <typename scalar_t, typename fn_t>
void dispatch_vector(int64_t aligned, const void* data, const fn_t& fn) {
  constexpr int vec = 16 / sizeof(scalar_t);
  if (aligned % vec == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    fn(std::integral_constant<int, vec>());
  } else {
    fn(std::integral_constant<int, 1>());
  }
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too much work for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// As it lies in memory: what is read in whole words can wait for its use, where single halves would be unpacked, and so
// waited for, at once. CUDA's own vectors are sure to be read and written in one.
template <int vec, typename scalar_t, size_t bytes = vec * sizeof(scalar_t)>
using Raw = std::conditional_t<
    bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, unsigned, scalar_t>>>;

template <int vec, typename scalar_t>
__device__ __forceinline__ Raw<vec, scalar_t> load_raw(const scalar_t* from) {
  return *reinterpret_cast<const Raw<vec, scalar_t>*>(from);
}

template <typename scalar_t, int vec, typename raw_t, typename acc_t>
__device__ __forceinline__ void unpack(acc_t (&values)[vec], const raw_t& raw) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && std::is_same_v<acc_t, float> && vec % 2 == 0) {  // the upper
                                                                                                            // halves of
                                                                                                            // floats
    uint32_t words[vec / 2];
    std::memcpy(words, &raw, sizeof(words));
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const uint32_t bits = i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000;
      std::memcpy(&values[i], &bits, sizeof(bits));
    }
  } else {
    scalar_t at[vec];
    std::memcpy(at, &raw, sizeof(at));
#pragma unroll
    for (int i = 0; i < vec; ++i) values[i] = static_cast<acc_t>(at[i]);
  }
}

template <int vec, typename scalar_t, typename acc_t>
__device__ __forceinline__ void load(acc_t (&values)[vec], const scalar_t* from) {
  unpack<scalar_t>(values, load_raw<vec>(from));
}

template <typename scalar_t, int vec, typename acc_t>
__device__ __forceinline__ Raw<vec, scalar_t> pack(const acc_t (&values)[vec]) {
  scalar_t at[vec];
#pragma unroll
  for (int i = 0; i < vec; ++i) at[i] = static_cast<scalar_t>(values[i]);
  Raw<vec, scalar_t> raw;
  std::memcpy(&raw, at, sizeof(raw));
  return raw;
}

template <int vec, typename scalar_t, typename acc_t>
__device__ __forceinline__ void store(scalar_t* to, const acc_t (&values)[vec]) {
  const Raw<vec, scalar_t> raw = pack<scalar_t>(values);
  if constexpr (sizeof(raw) == 16) {
    __stcg(reinterpret_cast<Raw<vec, scalar_t>*>(to), raw);  // a plain assignment was seen to become four
  } else {
    *reinterpret_cast<Raw<vec, scalar_t>*>(to) = raw;
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
constexpr bool kAddsFourAtOnce = true;
__device__ __forceinline__ void atomic_add_four(float* to, float a, float b, float c, float d) {
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(a, b, c, d));
}
#else
constexpr bool kAddsFourAtOnce = false;
__device__ void atomic_add_four(float*, float, float, float, float);  // never called
#endif

// to[i] += factor * values[i]
template <int vec, typename acc_t>
__device__ __forceinline__ void atomic_add(acc_t* to, acc_t factor, const acc_t (&v)[vec]) {
  if constexpr (kAddsFourAtOnce && std::is_same_v<acc_t, float> && vec % 4 == 0) {
#pragma unroll
    for (int i = 0; i < vec; i += 4) {
      atomic_add_four(to + i, factor * v[i], factor * v[i + 1], factor * v[i + 2], factor * v[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < vec; ++i) atomicAdd(to + i, factor * v[i]);
  }
}

// The sum over each run of `width` lanes, in its first lane. Every lane of the warp must come here.
template <typename acc_t>
__device__ __forceinline__ acc_t lane_sum(acc_t value, int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kWholeWarp, value, distance, width);
  }
  return value;
}

// A tensor of four dimensions as it is: of any type and layout.
struct AnyTensor {
  const void* data = nullptr;
  at::ScalarType type = at::kFloat;
  int64_t strides[4] = {};

  AnyTensor() = default;
  explicit AnyTensor(const at::Tensor& t) : data(t.const_data_ptr()), type(t.scalar_type()) {
    std::copy(t.strides().begin(), t.strides().end(), strides);
  }

  template <typename acc_t>
  __device__ acc_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t i = n * strides[0] + c * strides[1] + h * strides[2] + w * strides[3];
    switch (type) {
      case at::kHalf:
        return static_cast<acc_t>(static_cast<const c10::Half*>(data)[i]);
      case at::kBFloat16:
        return static_cast<acc_t>(static_cast<const c10::BFloat16*>(data)[i]);
      case at::kFloat:
        return static_cast<acc_t>(static_cast<const float*>(data)[i]);
      default:
        return static_cast<acc_t>(static_cast<const double*>(data)[i]);
    }
  }
};

// out [batch, columns, rows] = in [batch, rows, columns] + bias [columns], which may be null. Vectors of 16 bytes are
// read and written where the rows and the columns are whole ones.
template <typename out_t, typename in_t>
__global__ void __launch_bounds__(kThreads) transpose_kernel(
    out_t* __restrict__ out, const in_t* __restrict__ in, const out_t* __restrict__ bias, int64_t rows,
    int64_t columns) {
  constexpr int in_vec = 16 / sizeof(in_t), out_vec = 16 / sizeof(out_t);
  __shared__ in_t tile[kTile][kTile + (sizeof(in_t) < 4 ? 4 / sizeof(in_t) : 1)];  // against bank conflicts
  const int64_t across = (columns + kTile - 1) / kTile, down = (rows + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / (across * down), rest = blockIdx.x % (across * down);
  const int64_t first_row = rest / across * kTile, first_column = rest % across * kTile;
  in += image * rows * columns;
  out += image * rows * columns;
  const bool whole_rows = columns % in_vec == 0, whole_columns = rows % out_vec == 0;
  for (int i = threadIdx.x; i < kTile * kTile / in_vec; i += kThreads) {
    const int r = i / (kTile / in_vec), c = i % (kTile / in_vec) * in_vec;
    const int64_t row = first_row + r, column = first_column + c;
    if (row >= rows) break;
    if (whole_rows && column < columns) {
      in_t values[in_vec];
      load(values, in + row * columns + column);
#pragma unroll
      for (int e = 0; e < in_vec; ++e) tile[r][c + e] = values[e];
    } else {
      for (int e = 0; e < in_vec && column + e < columns; ++e) tile[r][c + e] = in[row * columns + column + e];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile / out_vec; i += kThreads) {
    const int c = i / (kTile / out_vec), r = i % (kTile / out_vec) * out_vec;
    const int64_t row = first_row + r, column = first_column + c;
    if (column >= columns) break;
    using acc_t = std::conditional_t<std::is_same_v<in_t, double>, double, float>;
    const acc_t added = bias ? static_cast<acc_t>(bias[column]) : acc_t(0);
    out_t* const to = out + column * rows + row;
    acc_t values[out_vec];
#pragma unroll
    for (int e = 0; e < out_vec; ++e) values[e] = static_cast<acc_t>(tile[r + e][c]) + added;
    if (whole_columns && row < rows) {
      store(to, values);
    } else {
#pragma unroll
      for (int e = 0; e < out_vec; ++e) {
        if (row + e < rows) to[e] = static_cast<out_t>(values[e]);
      }
    }
  }
}

// torch's copy between the two layouts reads or writes one of them element by element.
template <typename out_t, typename in_t>
void transpose(
    const at::Tensor& out, const at::Tensor& in, const out_t* bias, int64_t batch, int64_t rows, int64_t columns) {
  const int64_t blocks = batch * ((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  if (blocks == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  transpose_kernel<out_t, in_t><<<blocks_for(blocks, 1), kThreads, 0, stream>>>(
      out.data_ptr<out_t>(), in.const_data_ptr<in_t>(), bias, rows, columns);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// [N, C, H, W] -> [N, H * W, C], without a copy where the layout already is that one
template <typename scalar_t>
at::Tensor to_rows(const at::Tensor& t) {
  const at::Tensor dense = t.contiguous(t.suggest_memory_format());
  const int64_t pixels = t.size(2) * t.size(3), channels = t.size(1);
  if (dense.stride(1) == 1) return dense.permute({0, 2, 3, 1}).reshape({t.size(0), pixels, channels});
  at::Tensor rows = at::empty({t.size(0), pixels, channels}, t.options());
  transpose<scalar_t, scalar_t>(rows, dense, nullptr, t.size(0), channels, pixels);
  return rows;
}

// The way back, from accumulators too: `rows` [N, H * W, C] and a bias [C] or nothing into a tensor of the given sizes
// and layout
template <typename scalar_t, typename rows_t>
at::Tensor from_rows(
    const at::Tensor& rows, at::IntArrayRef sizes, at::MemoryFormat layout,
    const std::optional<at::Tensor>& bias = std::nullopt) {
  const auto type = c10::CppTypeToScalarType<scalar_t>::value;
  if (layout == at::MemoryFormat::ChannelsLast) {
    if (bias.has_value()) rows.add_(*bias);
    return rows.view({sizes[0], sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2}).to(type);
  }
  at::Tensor result = at::empty(sizes, rows.options().dtype(type));
  const at::Tensor added = bias.has_value() ? bias->contiguous() : at::Tensor();
  transpose<scalar_t, rows_t>(
      result, rows, added.defined() ? added.const_data_ptr<scalar_t>() : nullptr, sizes[0], sizes[2] * sizes[3],
      sizes[1]);
  return result;
}

}  // namespace dcnv2::cuda
