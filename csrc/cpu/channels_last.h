// What the CPU kernels share: maps laid out pixel by pixel, so that the neighbours of a sample are contiguous channel
// vectors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

namespace dcnv2::cpu {

// Asks for large pages under a large buffer that was just made: thousands of page faults fewer. Without effect
// elsewhere.
inline void advise_large_pages(const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, large_page = 2 << 20;
  if (t.nbytes() < 2 * large_page) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (begin + t.nbytes() - first) / page * page, MADV_HUGEPAGE);
#endif
}

// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < columns, up to the size of a tile
template <int64_t tile_rows, int64_t tile_columns, typename target_t, typename source_t>
inline void transpose_tile(
    target_t* target, int64_t target_stride, const source_t* source, int64_t source_stride, int64_t rows,
    int64_t columns) {
  alignas(64) target_t tile[tile_columns][tile_rows];
  const auto run = [&](int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) tile[j][i] = static_cast<target_t>(source[i * source_stride + j]);
    for (int64_t j = 0; j < n; ++j) std::copy(tile[j], tile[j] + m, target + j * target_stride);
  };
  if (rows == tile_rows && columns == tile_columns) {
    run(tile_rows, tile_columns);  // whose constants the compiler can use
  } else {
    run(rows, columns);
  }
}

constexpr int64_t tile_pixels = 64, tile_channels = 16;

// Copies `channels` channels of one image (first element `source`; `channel_stride`, `pixel_stride` in elements) into
// `target` [pixels, channels], converting the type on the way. The rows of `target` begin `row_stride` elements apart;
// 0 stands for `channels`.
template <typename target_t, typename source_t>
void to_channels_last(
    target_t* target, const source_t* source, int64_t pixels, int64_t channels, int64_t channel_stride,
    int64_t pixel_stride, int64_t row_stride = 0) {
  if (row_stride == 0) row_stride = channels;
  at::parallel_for(0, (pixels + tile_pixels - 1) / tile_pixels, 2, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * tile_pixels; p < std::min(end * tile_pixels, pixels); p += tile_pixels) {
      const int64_t n = std::min(tile_pixels, pixels - p);
      if (pixel_stride == 1) {
        for (int64_t c = 0; c < channels; c += tile_channels) {
          transpose_tile<tile_channels, tile_pixels>(
              target + p * row_stride + c, row_stride, source + c * channel_stride + p, channel_stride,
              std::min(tile_channels, channels - c), n);
        }
      } else {
        for (int64_t q = p; q < p + n; ++q)
          for (int64_t c = 0; c < channels; ++c)
            target[q * row_stride + c] = static_cast<target_t>(source[q * pixel_stride + c * channel_stride]);
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
  at::parallel_for(0, (pixels + tile_pixels - 1) / tile_pixels, 2, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * tile_pixels; p < std::min(end * tile_pixels, pixels); p += tile_pixels) {
      const int64_t n = std::min(tile_pixels, pixels - p);
      if (pixel_stride == 1) {
        for (int64_t c = 0; c < channels; c += tile_channels) {
          transpose_tile<tile_pixels, tile_channels>(
              target + c * channel_stride + p, channel_stride, source + p * row_stride + c, row_stride, n,
              std::min(tile_channels, channels - c));
        }
      } else {
        for (int64_t q = p; q < p + n; ++q)
          for (int64_t c = 0; c < channels; ++c)
            target[q * pixel_stride + c * channel_stride] = static_cast<target_t>(source[q * row_stride + c]);
      }
    }
  });
}

}  // namespace dcnv2::cpu
