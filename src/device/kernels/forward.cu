// The forward pass, beyond what candle has: see model/ops.rs and attention.rs.
#include "kernel.h"

#define ROW_THREADS 256

HELPER float silu(float x, float slope) { return x / (1.0f + expf(-slope * x)); }

// gate = activation(gate) * up: 0 silu, 1 gelu with tanh, 2 gpt-oss's clamped swiglu.
KERNEL gated(float *gate, const float *up, size_t count, int activation, float alpha, float limit) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float x = gate[i], u = up[i];
  if (activation == 0) {
    gate[i] = silu(x, 1.0f) * u;
  } else if (activation == 1) {
    gate[i] = silu(x, 2.0f * 0.7978845608f * (1.0f + 0.044715f * x * x)) * u;
  } else {
    x = x > limit ? limit : x;
    u = u > limit ? limit : u < -limit ? -limit : u;
    gate[i] = silu(x, alpha) * (u + 1.0f);
  }
}

// out[tokens[i]] += gates[i] * rows[i]; no token comes twice.
KERNEL add_gated_rows(float *out, const float *rows, const unsigned *tokens, const float *gates, unsigned width) {
  unsigned row = blockIdx.x, column = thread_y();
  if (column >= width) return;
  out[at(tokens[row], width, column)] += gates[row] * rows[at(row, width, column)];
}

// The largest of the threads' values, or their sum, to all of them.
HELPER float reduce(float *shared, float value, int sum) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      float a = shared[threadIdx.x], b = shared[threadIdx.x + half];
      shared[threadIdx.x] = sum ? a + b : a > b ? a : b;
    }
    __syncthreads();
  }
  float result = shared[0];
  __syncthreads();
  return result;
}

// Causal softmax of scores [kv heads, queries * share, keys], in f32, into the same shape of the kind: row r of a head is query first + r / share
// of query head kv * share + r % share; key k is the sequence's key low + k. A query sees the `window` keys up to itself. A sink takes
// part as a key without a value.
KERNEL softmax(void *out, float *scores, const float *sinks, unsigned rows, unsigned keys, unsigned share, unsigned first,
               unsigned low, unsigned window, float scale, float softcap, int kind) {
  __shared__ float shared[ROW_THREADS];
  unsigned row = blockIdx.x, kv = blockIdx.y;
  unsigned query = first + row / share;
  unsigned begin = query + 1 > window ? query + 1 - window : 0;
  begin = begin > low ? begin - low : 0;
  unsigned end = query + 1 - low;
  size_t base = at((size_t)kv * rows + row, keys, 0);
  float *score = scores + base;
  float largest = sinks ? sinks[kv * share + row % share] : -INFINITY;
  float sink = largest;
  for (unsigned k = begin + threadIdx.x; k < end; k += ROW_THREADS) {
    float value = score[k] * scale;
    if (softcap > 0.0f) value = softcap * tanhf(value / softcap);
    score[k] = value;
    largest = value > largest ? value : largest;
  }
  largest = reduce(shared, largest, 0);
  float total = 0.0f;
  for (unsigned k = begin + threadIdx.x; k < end; k += ROW_THREADS) {
    score[k] = expf(score[k] - largest);
    total += score[k];
  }
  total = reduce(shared, total, 1) + (sinks ? expf(sink - largest) : 0.0f);
  for (unsigned k = threadIdx.x; k < keys; k += ROW_THREADS) {
    float value = k >= begin && k < end ? score[k] / total : 0.0f;
    if (kind == KIND_F32) ((float *)out)[base + k] = value;
    else if (kind == KIND_BF16) ((unsigned short *)out)[base + k] = narrow_bf16(value);
    else ((unsigned short *)out)[base + k] = narrow_f16(value);
  }
}
