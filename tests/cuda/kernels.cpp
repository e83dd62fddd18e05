// The kernels, quantflow's and candle's, as they are, built as C++ and called thread by thread. Those whose threads need one another are rendered
// here: candle's by their definition, our softmax by that of src/device/attention.rs; tests/kernels.rs runs the softmax itself.

#include "device.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include "types.h"
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __CUDACC__
#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

static void __syncthreads() { stop("a kernel that waits for its other threads"); }

#include "codes.cu"
#include "matrices.cu"
#include "solver.cu"
#include "sums.cu"
namespace waiting {
#include "forward.cu"
}
using namespace waiting;
#include "affine.cu"
#include "binary.cu"
#include "cast.cu"
#include "fill.cu"
#include "indexing.cu"
#include "unary.cu"

namespace {

// How a function is called with places of its arguments: once, or as each thread of the grid.
template <auto function>
struct Caller;
template <typename... A, void (*function)(A...)>
struct Caller<function> {
    static std::vector<size_t> sizes() { return {sizeof(A)...}; }
    static void once(void **a) { apply(a, std::index_sequence_for<A...>{}); }
    static void threads(void **a) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
                for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) once(a);
    }
    template <size_t... i>
    static void apply(void **a, std::index_sequence<i...>) { function(*static_cast<std::remove_cv_t<A> *>(a[i])...); }
};

// Values of a tensor of any strides, in order.
template <typename T>
struct Strided {
    const T *values;
    size_t dimensions;
    const size_t *info;
    T operator[](size_t at) const {
        size_t place = 0;
        for (size_t d = dimensions; d-- > 0;) {
            place += at % info[d] * info[dimensions + d];
            at /= info[d];
        }
        return values[place];
    }
};

template <typename T>
void sum_small(size_t rows, size_t length, size_t dimensions, const size_t *info, const T *values, T *out) {
    Strided<T> in{values, dimensions, info};
    for (size_t row = 0; row < rows; row++) {
        out[row] = 0;
        for (size_t i = 0; i < length; i++) out[row] += in[row * length + i];
    }
}
template <typename T>
void sum(size_t, size_t length, size_t dimensions, const size_t *info, const T *values, T *out) {
    sum_small(gridDim.x, length, dimensions, info, values, out);
}
template <typename T, typename Out, bool place>
void greatest(size_t, size_t length, size_t dimensions, const size_t *info, const T *values, Out *out) {
    Strided<T> in{values, dimensions, info};
    for (size_t row = 0; row < gridDim.x; row++) {
        size_t best = 0;
        for (size_t i = 1; i < length; i++)
            if (in[row * length + i] > in[row * length + best]) best = i;
        out[row] = place ? Out(best) : Out(in[row * length + best]);
    }
}
void rms_norm(const float *in, float *out, const float *weights, int width, int, float eps) {
    for (size_t row = 0; row < gridDim.x; row++, in += width, out += width) {
        double squares = 0;
        for (int i = 0; i < width; i++) squares += double(in[i]) * in[i];
        float scale = 1 / std::sqrt(float(squares / width) + eps);
        for (int i = 0; i < width; i++) out[i] = scale * in[i] * (weights ? weights[i] : 1);
    }
}
// [batch, tokens, heads, width]: each pair of a head turned by its token's angle.
void rope(const float *in, const float *cosines, const float *sines, float *out, uint32_t batch, uint32_t tokens, uint32_t heads, uint32_t width,
          uint32_t own_angles) {
    for (size_t at = 0; at < size_t(batch) * tokens * heads; at++, in += width, out += width)
        for (uint32_t i = 0, half = width / 2; i < half; i++) {
            size_t token = own_angles ? at / heads : at / heads % tokens;
            float c = cosines[token * half + i], s = sines[token * half + i];
            out[i] = in[i] * c - in[i + half] * s;
            out[i + half] = in[i] * s + in[i + half] * c;
        }
}
void softmax_rows(void *out, float *scores, const float *sinks, unsigned rows, unsigned keys, unsigned share, unsigned first, unsigned low,
                  unsigned window, float scale, float softcap, int kind) {
    for (size_t row = 0; row < size_t(gridDim.y) * rows; row++) {
        size_t query = first + row % rows / share, head = row / rows * share + row % share;
        size_t seen = query + 1 > window ? query + 1 - window : 0;
        float *values = scores + row * keys, greatest = sinks ? sinks[head] : -INFINITY, total = 0;
        auto sees = [&](size_t key) { return key + low >= seen && key + low <= query; };
        for (size_t key = 0; key < keys; key++) {
            values[key] *= scale;
            if (softcap > 0) values[key] = softcap * std::tanh(values[key] / softcap);
            if (sees(key)) greatest = std::max(greatest, values[key]);
        }
        for (size_t key = 0; key < keys; key++) total += values[key] = sees(key) ? std::exp(values[key] - greatest) : 0;
        if (sinks) total += std::exp(sinks[head] - greatest);
        for (size_t key = 0; key < keys; key++) {
            float share_of = values[key] / total;
            size_t at = row * keys + key;
            if (kind == KIND_F32) static_cast<float *>(out)[at] = share_of;
            if (kind == KIND_BF16) static_cast<__nv_bfloat16 *>(out)[at] = share_of;
            if (kind == KIND_F16) static_cast<__half *>(out)[at] = share_of;
        }
    }
}

#define THREADS_OF(name) {#name, Caller<&name>::sizes(), Caller<&name>::threads},
#define ONCE(name, ...) {#name, Caller<&__VA_ARGS__>::sizes(), Caller<&__VA_ARGS__>::once},
const Kernel kernels[] = {
    ONCE(softmax, softmax_rows)
    ONCE(rmsnorm_f32, rms_norm)
    ONCE(rope_thd_f32, rope)
    ONCE(fast_sum_f32, sum<float>)
    ONCE(fast_sum_f64, sum<double>)
    ONCE(fast_sum_small_f32, sum_small<float>)
    ONCE(fast_sum_small_f64, sum_small<double>)
    ONCE(fast_max_f32, greatest<float, float, false>)
    ONCE(fast_max_f64, greatest<double, double, false>)
    ONCE(fast_argmax_f32, greatest<float, uint32_t, true>)
#include KERNELS
};

}  // namespace

const Kernel &kernel(const char *name) {
    for (const Kernel &kernel : kernels)
        if (!strcmp(kernel.name, name)) return kernel;
    stop("no kernel %s: is it one of those that kernels.cpp has to render?", name);
}
