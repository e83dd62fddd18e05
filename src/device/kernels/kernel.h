// What all kernels share. They are plain C with CUDA's names, so that a C compiler builds them, too: the tests run them on the CPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define KERNEL extern "C" __global__ void
#define HELPER static __device__ __forceinline__
#define RESTRICT __restrict__
#define UNROLL _Pragma("unroll")
#else
#define KERNEL void
#define HELPER static inline
#define RESTRICT restrict
#define UNROLL
#endif

// Kinds of values, as in cuda.rs.
#define KIND_F32 0
#define KIND_BF16 1
#define KIND_F16 2

HELPER size_t at(size_t row, size_t columns, size_t column) { return row * columns + column; }

HELPER unsigned thread_x(void) { return blockIdx.x * blockDim.x + threadIdx.x; }

// The column of a thread whose row is blockIdx.x: a grid's other side, which counts rows elsewhere, has 16 bits.
HELPER unsigned thread_y(void) { return blockIdx.y * blockDim.x + threadIdx.x; }

// The significand of a positive, normal double, rounded to `bits` explicit bits, to nearest even.
HELPER double round_significand(double value, int bits) {
  union { double value; unsigned long long bits; } word;
  word.value = value;
  int dropped = 52 - bits;
  unsigned long long odd = (word.bits >> dropped) & 1;
  word.bits += odd + ((1ull << (dropped - 1)) - 1);
  word.bits &= ~((1ull << dropped) - 1);
  return word.value;
}

// As ScaleDtype::round in numerics/quantized.rs: `value` in the storage dtype, not below its smallest normal number.
HELPER double round_scale(double value, int kind) {
  double smallest = kind == KIND_F16 ? 6.103515625e-05 : 1.1754943508222875e-38;
  if (!(value > smallest)) return smallest;
  if (kind == KIND_BF16) return round_significand(value, 7);
  if (kind == KIND_F16) return round_significand(value < 65504.0 ? value : 65504.0, 10);
  return (double)(float)value;
}

// The bits of a float, not NaN, in 16: to nearest even.
HELPER unsigned short narrow_bf16(float value) {
  union { float value; unsigned bits; } word;
  word.value = value;
  return (unsigned short)((word.bits + 0x7fffu + ((word.bits >> 16) & 1)) >> 16);
}

// As above, in half precision. Values below its smallest normal number keep what bits they can.
HELPER unsigned short narrow_f16(float value) {
#ifdef __CUDACC__
  return __half_as_ushort(__float2half_rn(value));
#else
  union { _Float16 value; unsigned short bits; } word;
  word.value = (_Float16)value;
  return word.bits;
#endif
}
