// The two instructions of csrc/cuda/matrix_unit.h on the GPU of emulated_cuda.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "emulated_cuda.h"

namespace dcnv2::cuda {

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulated::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a row of a matrix is not aligned");
  const int lane = emulated::current->id % 32;
  for (int i = 0; i < 4; ++i) {
    const void* from = emulated::exchange(row, i * 8 + lane / 4, __LINE__);
    std::memcpy(&to[i], static_cast<const char*>(from) + lane % 4 * 4, 4);
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
