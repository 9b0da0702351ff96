// What fused_deform_conv.h needs of a GPU of compute capability 8.0 or later: copies in the background and the matrix
// units, for half types. The letters are those of the PTX manual.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace dcnv2::cuda {

// Copies 16 bytes from memory to shared memory, or fills them with zeros, in the background.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
#else
  __trap();
#endif
}

// Ends a batch of this thread's copies.
__device__ __forceinline__ void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until no more than `batches` batches of this thread's copies are under way.
template <int batches>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(batches) : "memory");
#endif
}

// d [16, 8] += a [16, 16] * b [16, 8]. Of a lane are, with g = lane / 4 and t = lane % 4 * 2,
// of a, at (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8): that element and the one right of it,
// of b, at (t, g), (t + 8, g): that element and the one below,
// of d, at (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1): that element.
template <typename scalar_t>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DCNV2_MULTIPLY_ADD(type)                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define DCNV2_MULTIPLY_ADD(type) __trap()
#endif

template <>
__device__ __forceinline__ void multiply_add<c10::Half>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DCNV2_MULTIPLY_ADD("f16");
}

template <>
__device__ __forceinline__ void multiply_add<c10::BFloat16>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DCNV2_MULTIPLY_ADD("bf16");
}

#undef DCNV2_MULTIPLY_ADD

}  // namespace dcnv2::cuda
