// A GPU in one thread of the CPU, enough of it to run the sources in csrc/cuda: the test puts this file in the place of
// c10/cuda's.
//
// Each thread of a block is a fiber. Fibers change only at barriers and warp operations, and in random order, so that a
// missing barrier shows in the results; a barrier or a warp operation that not all of its threads reach ends the
// process.
#pragma once

#include <ATen/core/Tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#define C10_CUDA_CHECK(call) call

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class State { kRuns, kAtBlockBarrier, kAtWarpOperation, kEnded };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  int id, line, operations;
  State state;
};
inline std::vector<Fiber> fibers(1024);
inline char lanes[32][2][32][8];  // what each lane of each warp gives to a warp operation, and to the next one
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> kernel_call;
inline void* dynamic_memory;  // of a block, shared, and just as much as was asked for
inline std::mt19937 random_order(1);

inline void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "emulated GPU, line %d: %s\n", current ? current->line : 0, message);
  std::abort();
}

inline void wait(State state, int line) {
  current->state = state;
  current->line = line;
  swapcontext(&current->context, &scheduler);
}

inline void run_fiber() {
  kernel_call();
  wait(State::kEnded, 0);
}

// Whether all of the fibers first .. last - 1 wait at the same place, which they may then leave.
inline bool release(int first, int last, State state) {
  int waiting = 0;
  for (int t = first; t < last; ++t) waiting += fibers[t].state == state;
  if (waiting == 0) return false;
  require(waiting == last - first, "not all threads reach it");
  for (int t = first; t < last; ++t) {
    require(
        state == State::kAtBlockBarrier || fibers[t].line == fibers[first].line, "lanes are at different operations");
    fibers[t].state = State::kRuns;
  }
  return true;
}

inline void run_block() {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  std::vector<Fiber*> order;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.id = t, fiber.line = 0, fiber.operations = 0, fiber.state = State::kRuns;
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
    order.push_back(&fiber);
  }
  for (bool again = true; again;) {
    again = false;
    const auto resting = random_order();  // a bit a warp: some run ahead of others
    std::shuffle(order.begin(), order.end(), random_order);
    for (Fiber* fiber : order) {
      if (fiber->state != State::kRuns) continue;
      again = true;
      if (resting >> fiber->id / 32 & 1) continue;
      current = fiber;
      threadIdx = fiber->index;
      swapcontext(&scheduler, &fiber->context);
    }
    for (int first = 0; first < threads; first += 32) again |= release(first, first + 32, State::kAtWarpOperation);
    again = again || release(0, threads, State::kAtBlockBarrier);
  }
}

template <typename... parameters_t>
auto launch(dim3 grid, dim3 block, size_t bytes, void (*kernel)(parameters_t...)) {
  return [=](parameters_t... arguments) {
    blockDim = block;
    gridDim = grid;
    require(
        grid.x > 0 && grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536 && block.x * block.y * block.z <= 1024,
        "bad launch");
    require(block.x * block.y * block.z % 32 == 0, "a warp is not full");
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_order);
    kernel_call = [&] { kernel(arguments...); };
    dynamic_memory = std::malloc(bytes);
    for (unsigned i : order) {
      blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      run_block();
    }
    std::free(dynamic_memory);
  };
}

// A warp operation: gives `value`, takes that of the lane `from`.
template <typename value_t>
value_t exchange(value_t value, int from, int line) {
  auto& slots = lanes[current->id / 32][current->operations++ % 2];
  std::memcpy(slots[current->id % 32], &value, sizeof(value));
  wait(State::kAtWarpOperation, line);
  std::memcpy(&value, slots[from], sizeof(value));
  return value;
}

template <typename value_t>
value_t shuffle_down(int line, unsigned mask, value_t value, int distance, int width) {
  require(mask == 0xffffffff, "a mask that leaves out lanes");
  const int lane = current->id % 32;
  return exchange(value, lane % width + distance < width ? lane + distance : lane, line);
}

}  // namespace emulated

#define __syncthreads() emulated::wait(emulated::State::kAtBlockBarrier, __LINE__)
#define __syncwarp() emulated::exchange(0, 0, __LINE__)
#define __shfl_down_sync(...) emulated::shuffle_down(__LINE__, __VA_ARGS__)

template <typename value_t>
void atomicAdd(value_t* to, value_t value) {
  *to += value;
}

template <typename value_t>
void __stcg(value_t* to, const value_t& value) {
  *to = value;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename kernel_t>
void cudaFuncGetAttributes(cudaFuncAttributes* attributes, kernel_t*) {
  attributes->ptxVersion = 90;
}
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, int, int) { *value = 12; }
template <typename kernel_t>
void cudaFuncSetAttribute(kernel_t*, int, int) {}

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline int getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda
