// Memory that the CPU kernels work on: a thread's own, and images of either layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dcnv2::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

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

// Memory of a thread, not initialised
template <typename value_t>
struct Buffer {
  struct Free {
    void operator()(value_t* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<value_t, Free> memory;

  Buffer() = default;
  explicit Buffer(int64_t size)
      : memory(static_cast<value_t*>(::operator new(size * sizeof(value_t), std::align_val_t(64)))) {}
  value_t* data() const { return memory.get(); }
};

template <typename value_t>
Buffer<value_t> zeros(int64_t size) {
  Buffer<value_t> buffer(size);
  std::fill_n(buffer.data(), size, value_t(0));
  return buffer;
}

// The images of a tensor [N, C, H, W] of either layout
template <typename value_t>
struct Images {
  value_t* data;
  int64_t image, channel, pixel;  // strides

  value_t* at(int64_t n, int64_t c, int64_t p) const { return data + n * image + c * channel + p * pixel; }
};

template <typename value_t>
Images<value_t> images(value_t* data, int64_t channels, int64_t pixels, bool channels_last) {
  return {data, channels * pixels, channels_last ? 1 : pixels, channels_last ? channels : 1};
}

}  // namespace dcnv2::cpu
