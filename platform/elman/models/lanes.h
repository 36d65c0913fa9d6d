// Vectors of sixteen floats, in the processor's registers where the compiler may use them (AVX-512 with
// bfloat16). Elsewhere the same source computes the same with vectors of any width.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#define ELMAN_BF16 1
#endif

namespace {

constexpr long LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Bits;  // of a bfloat16 or a half

template <class Vector>
inline Vector load(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Vector>
inline void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof value);
}

inline Floats splat(float value) { return value - Floats{}; }

#ifdef ELMAN_BF16
inline Floats from_bf16(const Bits* from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
inline void to_bf16(Bits* to, Floats value) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
inline Floats from_half(const Bits* from) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline void to_half(Bits* to, Floats value) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Of a comparison with NaN the second argument is the result, so that NaN stays.
inline Floats clamp(Floats value, float bound) {
    return (Floats)_mm512_max_ps(_mm512_set1_ps(-bound), _mm512_min_ps(_mm512_set1_ps(bound), (__m512)value));
}
inline Floats rounded(Floats value) { return (Floats)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
inline Floats power_of_two(Floats whole) { return (Floats)_mm512_scalef_ps(_mm512_set1_ps(1.0f), (__m512)whole); }
inline Floats reciprocal(Floats value) {  // a guess of 14 bits, doubled by Newton's step
    const Floats guess = (Floats)_mm512_rcp14_ps((__m512)value);
    return guess * (2.0f - value * guess);
}
#else
inline Floats from_bf16(const Bits* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
inline Halves bf16_bits(Floats value) {
    const Words bits = (Words)value;
    const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words is_number = (Words)(value == value);
    return __builtin_convertvector((nearest & is_number) | (0x7fc0 & ~is_number), Halves);
}
inline void to_bf16(Bits* to, Floats value) { store(to, bf16_bits(value)); }
// A half is a float with ten bits of mantissa whose exponent counts from 112 lower.
inline Floats from_half(const Bits* from) {
    const Words bits = __builtin_convertvector(load<Halves>(from), Words);
    const Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Words)magnitude | ((bits & 0x8000) << 16));
}
inline void to_half(Bits* to, Floats value) {
    const Words bits = (Words)value;
    const Words magnitude = (Words)((Floats)(bits & 0x7fffffff) * 0x1p-112f);
    const Words nearest = (magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    store(to, __builtin_convertvector(nearest | ((bits >> 16) & 0x8000), Halves));
}
inline Floats select(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Floats clamp(Floats value, float bound) {
    value = select(value > bound, splat(bound), value);
    return select(value < -bound, splat(-bound), value);
}
inline Floats rounded(Floats value) { return (value + 0x1.8p23f) - 0x1.8p23f; }
inline Floats power_of_two(Floats whole) { return (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23); }
inline Floats reciprocal(Floats value) { return 1.0f / value; }
#endif

// exp(x) − 1 for |x| ≤ 80, good to 5e-7: x = n ln 2 + r, and a polynomial in r that
// interpolates (exp(r) − 1) / r at Chebyshev's nodes on ± ln 2 / 2.
inline Floats exp_minus_1(Floats x) {
    const Floats n = rounded(x * 1.44269504f);
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = 8.363179052e-3f * r + 4.187568634e-2f;
    p = p * r + 1.666657699e-1f;
    p = p * r + 4.999937189e-1f;
    p = p * r + 1.0f;
    const Floats scale = power_of_two(n);
    return scale * (r * p) + (scale - 1.0f);
}
inline Floats sigmoid(Floats x) { return reciprocal(2.0f + exp_minus_1(clamp(-x, 80.0f))); }
inline Floats tangent(Floats x) {
    const Floats e = exp_minus_1(clamp(2.0f * x, 40.0f));
    return e * reciprocal(2.0f + e);
}

}  // namespace
