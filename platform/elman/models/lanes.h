// Functions of sixteen floats, and their bfloat16 and half-precision forms: the processor's own where the
// compiler may use them (AVX-512 with bfloat16). Elsewhere the same source computes the same.
#pragma once

#include <utility>

#include "vectors.h"
#if defined(__AVX512BF16__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#define ELMAN_BF16 1
#endif

namespace {

typedef uint16_t Bits;  // of a bfloat16 or a half

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
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }  // b, where one is NaN
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
inline Floats clamp(Floats value, float bound) {
    value = select(value > bound, splat(bound), value);
    return select(value < -bound, splat(-bound), value);
}
inline Floats larger(Floats a, Floats b) { return select(a > b, a, b); }
inline Floats rounded(Floats value) { return (value + 0x1.8p23f) - 0x1.8p23f; }
inline Floats power_of_two(Floats whole) { return (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23); }
inline Floats reciprocal(Floats value) { return 1.0f / value; }
#endif

// exp(r) − 1 for |r| ≤ ln 2 / 2: a polynomial that interpolates (exp(r) − 1) / r at Chebyshev's nodes.
inline Floats polynomial(Floats r) {
    Floats p = 8.363179052e-3f * r + 4.187568634e-2f;
    p = p * r + 1.666657699e-1f;
    p = p * r + 4.999937189e-1f;
    p = p * r + 1.0f;
    return r * p;
}
// exp(x) − 1 for |x| ≤ 80, good to 5e-7: x = n ln 2 + r.
inline Floats exp_minus_1(Floats x) {
    const Floats n = rounded(x * 1.44269504f);
    const Floats scale = power_of_two(n);
    return scale * polynomial((x - n * 0.693359375f) + n * 2.12194440e-4f) + (scale - 1.0f);
}
// exp(x), from -87 on, good to 5e-7 of itself.
inline Floats exponential(Floats x) {
    x = larger(splat(-87.0f), x);
    const Floats n = rounded(x * 1.44269504f);
    const Floats scale = power_of_two(n);
    return scale * polynomial((x - n * 0.693359375f) + n * 2.12194440e-4f) + scale;
}
inline Floats sigmoid(Floats x) { return reciprocal(2.0f + exp_minus_1(clamp(-x, 80.0f))); }
inline Floats tangent(Floats x) {
    const Floats e = exp_minus_1(clamp(2.0f * x, 40.0f));
    return e * reciprocal(2.0f + e);
}

// Two rows of sixteen as pairs of bfloat16, the first in the low half.
inline Words paired(Floats first, Floats second) {
#ifdef ELMAN_BF16
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Words)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    const Words low = __builtin_convertvector(bf16_bits(first), Words);
    return low | __builtin_convertvector(bf16_bits(second), Words) << 16;
#endif
}

// Sixteen rows of sixteen words become columns.
inline void transpose(Words* rows) {
#ifdef ELMAN_BF16
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_i32x4(b[i + j], b[i + j + 4], 0x88);
            a[i + j + 4] = _mm512_shuffle_i32x4(b[i + j], b[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = (Words)_mm512_shuffle_i32x4(a[j], a[j + 8], 0x88);
        rows[j + 8] = (Words)_mm512_shuffle_i32x4(a[j], a[j + 8], 0xdd);
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) std::swap(((uint32_t*)(rows + i))[j], ((uint32_t*)(rows + j))[i]);
#endif
}

}  // namespace
