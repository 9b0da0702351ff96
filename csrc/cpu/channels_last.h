// What the CPU kernels share: maps laid out pixel by pixel, so that the neighbours of a sample are contiguous channel vectors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

// A package is compiled for the oldest processor of its kind; the hot loops are compiled again for newer ones, and the
// best version is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCNV2_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCNV2_MULTIVERSION
#endif

// Loops marked so may be reordered: they write through pointers that never overlap, and their sums need no fixed order
// (the order the compiler picks is the same in every run).
#if defined(_OPENMP)
#define DCNV2_PRAGMA(x) _Pragma(#x)
#define DCNV2_SIMD DCNV2_PRAGMA(omp simd)
#define DCNV2_SIMD_SUM(...) DCNV2_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define DCNV2_SIMD
#define DCNV2_SIMD_SUM(...)
#endif

namespace dcnv2 {

// Copies `channels` channels of one image (first element `source`; `channel_stride`, `pixel_stride` in elements) into
// `target` [pixels, channels], converting the type on the way. The rows of `target` begin `row_stride` elements apart; 0
// stands for `channels`.
template <typename target_t, typename source_t>
void to_channels_last(
    target_t* target, const source_t* source, int64_t pixels, int64_t channels, int64_t channel_stride,
    int64_t pixel_stride, int64_t row_stride = 0) {
  if (row_stride == 0) row_stride = channels;
  constexpr int64_t block = 32;  // pixels: both sides of the transpose stay in the first-level cache
  at::parallel_for(0, (pixels + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p0 = begin * block; p0 < std::min(end * block, pixels); p0 += block) {
      const int64_t p1 = std::min(p0 + block, pixels);
      if (channel_stride == 1) {
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t c = 0; c < channels; ++c)
            target[p * row_stride + c] = static_cast<target_t>(source[p * pixel_stride + c]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t p = p0; p < p1; ++p)
            target[p * row_stride + c] = static_cast<target_t>(source[c * channel_stride + p * pixel_stride]);
      }
    }
  });
}

// The way back: `source` [pixels, channels], its rows `row_stride` elements apart, into the channels of an image.
template <typename target_t, typename source_t>
void from_channels_last(
    target_t* target, const source_t* source, int64_t pixels, int64_t channels, int64_t channel_stride,
    int64_t pixel_stride, int64_t row_stride = 0) {
  if (row_stride == 0) row_stride = channels;
  constexpr int64_t block = 32;
  at::parallel_for(0, (pixels + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p0 = begin * block; p0 < std::min(end * block, pixels); p0 += block) {
      const int64_t p1 = std::min(p0 + block, pixels);
      if (channel_stride == 1) {
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t c = 0; c < channels; ++c)
            target[p * pixel_stride + c] = static_cast<target_t>(source[p * row_stride + c]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t p = p0; p < p1; ++p)
            target[c * channel_stride + p * pixel_stride] = static_cast<target_t>(source[p * row_stride + c]);
      }
    }
  });
}

}  // namespace dcnv2
