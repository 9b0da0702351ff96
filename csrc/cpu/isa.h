// Which of the compiled versions of a hot loop this processor runs.
//
// A package is compiled for the oldest processor of its kind. What is hot stands in headers that are included once for
// each instruction set, under `#pragma GCC target` and in a namespace of its own (DCNV2_ISA), and is called through the
// one that isa() names.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCNV2_X86_ISAS 1
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

enum class Isa { plain, avx2, avx512, avx512_bf16 };

// The best that the processor has; PyTorch's own variable, ATEN_CPU_CAPABILITY=avx2 or =default, holds it to less.
inline Isa isa() {
  static const Isa best = [] {
#if defined(DCNV2_X86_ISAS)
    const char* const held = std::getenv("ATEN_CPU_CAPABILITY");
    const auto held_to = [&](const char* name) { return held && std::strcmp(held, name) == 0; };
    if (held_to("default") || !__builtin_cpu_supports("x86-64-v3")) return Isa::plain;
    if (held_to("avx2") || !__builtin_cpu_supports("x86-64-v4")) return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
    return Isa::plain;
#endif
  }();
  return best;
}

}  // namespace dcnv2::cpu
