// The types and functions that NVIDIA's headers have, as far as kernels use them, in C++ for the CPU. It stands for all of those headers, and for
// candle's compatibility.cuh, whose atomic functions no kernel that runs here needs.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

using std::isnan, std::max, std::min;

struct float4 {
    float x, y, z, w;
};

// 16 bits that count as a float. Conversions round to nearest even.
template <uint16_t (*narrow)(float), float (*widen)(uint16_t)>
struct Narrow {
    uint16_t bits;

    Narrow() = default;
    template <typename T>
    Narrow(T value) : bits(narrow(static_cast<float>(value))) {}
    operator float() const { return widen(bits); }

    friend Narrow operator+(Narrow a, Narrow b) { return float(a) + float(b); }
    friend Narrow operator-(Narrow a, Narrow b) { return float(a) - float(b); }
    friend Narrow operator*(Narrow a, Narrow b) { return float(a) * float(b); }
    friend Narrow operator/(Narrow a, Narrow b) { return float(a) / float(b); }
    friend Narrow operator-(Narrow a) { return -float(a); }
    Narrow &operator+=(Narrow b) { return *this = *this + b; }
};

inline uint16_t narrow_to_half(float value) { return _cvtss_sh(value, 0); }
inline float widen_half(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t narrow_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float widen_bfloat(uint16_t half) {
    uint32_t bits = uint32_t{half} << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

using __half = Narrow<narrow_to_half, widen_half>;
using __nv_bfloat16 = Narrow<narrow_to_bfloat, widen_bfloat>;

inline float __half2float(__half value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }

#define OF_EACH(name, of)                                  \
    inline __half name(__half a) { return of(float(a)); } \
    inline __nv_bfloat16 name(__nv_bfloat16 a) { return of(float(a)); }
OF_EACH(hsqrt, std::sqrt)
OF_EACH(hcos, std::cos)
OF_EACH(hsin, std::sin)
OF_EACH(hlog, std::log)
OF_EACH(hexp, std::exp)
OF_EACH(__habs, std::fabs)
#undef OF_EACH
template <typename T>
bool __hisnan(T a) { return std::isnan(float(a)); }
template <typename T>
T __hmax_nan(T a, T b) { return std::max(float(a), float(b)); }
template <typename T>
T __hmin_nan(T a, T b) { return std::min(float(a), float(b)); }

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }

// Of 8-bit floats nothing runs here.
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float) { __builtin_trap(); }
};
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(uint8_t, int) { __builtin_trap(); }

inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678f); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * 0.7071067811865475); }
// One thread runs at a time.
template <typename T>
T atomicAdd(T *place, T value) {
    T before = *place;
    *place = before + value;
    return before;
}
