// The GPU as the kernels see it: a thin layer over CUDA and PTX (sm_80 and later).
//
// Built without nvcc, the same names come from tests/emulation/emulation.h, which runs the kernels
// on the CPU; so kernels use nothing of CUDA but this.
#pragma once

#include <cstdint>

namespace memdense::device {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Four words that travel together, through 16-byte accesses.
struct alignas(16) Piece {
  uint32_t words[4];
};

// What the launcher needs to know of a device.
struct Properties {
  int multiprocessors, shared_per_block, shared_per_multiprocessor;  // the latter two in bytes
};

// x by y blocks of so many threads, with so many bytes of shared memory.
struct Grid {
  int x, y, threads, shared;
};

}  // namespace memdense::device

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define MEMDENSE_DISPATCH CUDA
#define MEMDENSE_DEVICE __device__ __forceinline__
#define MEMDENSE_BOTH __host__ __device__ __forceinline__
#define MEMDENSE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace memdense::device {

// ---- where a thread is

MEMDENSE_DEVICE int thread() { return threadIdx.x; }
MEMDENSE_DEVICE int threads() { return blockDim.x; }
MEMDENSE_DEVICE int block() { return blockIdx.x; }
MEMDENSE_DEVICE int blocks() { return gridDim.x; }
MEMDENSE_DEVICE int block_row() { return blockIdx.y; }

// The same number, of which the compiler does not know that it is: nothing made of it is kept.
MEMDENSE_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- waiting for others

MEMDENSE_DEVICE void synchronize_block() { __syncthreads(); }

// Until so many threads of a block have come to one of its barriers, 1 to 15; to arrive is not to
// wait.
template <int kBarrier>
MEMDENSE_DEVICE void synchronize_threads(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}
template <int kBarrier>
MEMDENSE_DEVICE void arrive_threads(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

MEMDENSE_DEVICE void synchronize_warp() { __syncwarp(); }

MEMDENSE_DEVICE float exchange(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
MEMDENSE_DEVICE double exchange(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- shared memory

MEMDENSE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

MEMDENSE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Bytes of device memory that travel together.
constexpr int kSectorBytes = 32;

// The sector of an address into the L2 cache.
MEMDENSE_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// 16 bytes into shared memory, in flight until wait_async(); zeros where not `valid`.
MEMDENSE_DEVICE void copy_async(char* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// For this thread's copies only: others see them after a barrier.
MEMDENSE_DEVICE void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- matrix fragments: of a warp, four 8x8 matrices of 16-bit values or 8x4 of 32-bit ones

// Lane 8i + r gives the address of row r of matrix i; lane l receives word l % 4 of row l / 4.
MEMDENSE_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// As above, of transposed matrices: 16-bit values only.
MEMDENSE_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 32 bytes] * b[32 bytes, 8]
MEMDENSE_DEVICE void multiply_add(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

MEMDENSE_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// In TF32: the operands' last 13 bits are not read; see round_tf32.
MEMDENSE_DEVICE void multiply_add(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers

MEMDENSE_DEVICE float to_float(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
MEMDENSE_DEVICE float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
MEMDENSE_DEVICE float to_float(float x) { return x; }

// A word's values.
MEMDENSE_DEVICE void unpack(Half, uint32_t word, float* to) {
  asm("{.reg .f16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low;\n\t"
      "cvt.f32.f16 %1, high;}"
      : "=f"(to[0]), "=f"(to[1])
      : "r"(word));
}
MEMDENSE_DEVICE void unpack(BFloat16, uint32_t word, float* to) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
MEMDENSE_DEVICE void unpack(float, uint32_t word, float* to) { *to = __uint_as_float(word); }

// A word of so many values, rounded.
MEMDENSE_DEVICE uint32_t pack(Half, const float* x) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
}
MEMDENSE_DEVICE uint32_t pack(BFloat16, const float* x) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
}
MEMDENSE_DEVICE uint32_t pack(float, const float* x) { return __float_as_uint(*x); }

// The same of relu(x); a NaN passes.
MEMDENSE_DEVICE uint32_t relu_word(Half, const float* x) {
  uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
}
MEMDENSE_DEVICE uint32_t relu_word(BFloat16, const float* x) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
}
MEMDENSE_DEVICE uint32_t relu_word(float, const float* x) {
  return __float_as_uint(*x <= 0.f ? 0.f : *x);
}

MEMDENSE_DEVICE uint32_t round_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// The upper half of a product.
MEMDENSE_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }

MEMDENSE_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
MEMDENSE_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
MEMDENSE_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
MEMDENSE_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }

// ---- the host's side

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("memdense: ") + what + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

inline Properties properties(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

// A kernel that takes one struct, whichever that is.
using Kernel = const void*;

template <typename Argument>
Kernel erased(void (*kernel)(Argument)) {
  return reinterpret_cast<Kernel>(kernel);
}

// Why the current device cannot run a kernel, or null: it may be of none of the architectures that
// were compiled for, or its driver older than the compiler.
inline const char* refusal(Kernel kernel) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess) return nullptr;
  return cudaGetErrorString(cudaGetLastError());
}

// Before a kernel's first start with so many bytes of shared memory on the current device.
inline void prepare(Kernel kernel, int shared) {
  // what a block may have without asking
  constexpr int kUsual = 48 * 1024;
  if (shared <= kUsual) return;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  // all there is: a launch of less, meanwhile, must not take away what this one asked for
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "cudaFuncSetAttribute");
}

// On the current device; the argument may change as soon as this returns.
inline void start(Kernel kernel, const Grid& grid, const void* argument, Stream stream) {
  void* arguments[] = {const_cast<void*>(argument)};
  check(cudaLaunchKernel(kernel, dim3(grid.x, grid.y), dim3(grid.threads), arguments, grid.shared,
                         stream),
        "launching a kernel");
}

}  // namespace memdense::device

#endif
