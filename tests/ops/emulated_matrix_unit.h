// csrc/cuda/matrix_unit.h on the GPU of emulated_cuda.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "emulated_cuda.h"

namespace dcnv2::cuda {

// A copy is made when it is waited for, no earlier; a batch too many that nobody waits for is lost.
struct Copy {
  void* to;
  const void* from;
};
inline std::vector<std::vector<std::vector<Copy>>> copies(1024);  // of each thread, of each batch

inline void copy_async(void* to, const void* from, bool exists) {
  emulated::require(
      reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "not aligned");
  auto& batches = copies[emulated::current->id];
  if (batches.empty()) batches.emplace_back();
  batches.back().push_back({to, exists ? from : nullptr});
}

inline void end_copies() {
  auto& batches = copies[emulated::current->id];
  if (batches.empty()) batches.emplace_back();
  batches.emplace_back();  // the one that is open
}

template <int batches_left>
void wait_for_copies() {
  auto& batches = copies[emulated::current->id];
  while (batches.size() > batches_left + 1) {
    for (const Copy& copy : batches.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    batches.erase(batches.begin());
  }
}

struct Operands {
  uint32_t a[4], b[2];
};
inline Operands operands[32][2][32];  // as emulated::lanes

template <typename scalar_t>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulated::current->id % 32;
  Operands(&all)[32] = operands[emulated::current->id / 32][emulated::current->operations % 2];
  all[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::exchange(0, 0, __LINE__);
  const auto element = [](const uint32_t& pair, int which) {
    scalar_t value;
    std::memcpy(&value, reinterpret_cast<const char*>(&pair) + 2 * which, 2);
    return static_cast<float>(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = element(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
      d[i] += left * element(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
  }
}

}  // namespace dcnv2::cuda
