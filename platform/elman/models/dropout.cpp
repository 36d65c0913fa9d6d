// Dropout whose mask is never kept: element i is dropped where the i-th random word of a seed is small,
// and backward draws the same words again.
//
// The words are Philox4x32-10's (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3,
// doi:10.1145/2063384.2063405), a function of key and counter: so any thread can draw any of them, and
// a mask depends on its seed alone. Word w of counter c belongs to element 64 ⌊c / 16⌋ + 16 w + c mod 16.
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "lanes.h"

namespace {

constexpr long WORDS = 4, GROUP = WORDS * LANES;

struct Product {
    Words low, high;
};

inline Product product(Words value, uint32_t factor) {
#ifdef ELMAN_BF16
    const __m512i factors = _mm512_set1_epi64(factor);
    const __m512i even = _mm512_mul_epu32((__m512i)value, factors);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)value, 32), factors);
    return {(Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)),
            (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
#else
    Product result;
    for (long lane = 0; lane < LANES; lane++) {
        const uint64_t whole = (uint64_t)value[lane] * factor;
        result.low[lane] = (uint32_t)whole;
        result.high[lane] = (uint32_t)(whole >> 32);
    }
    return result;
#endif
}

void philox(uint64_t seed, uint64_t group, Words* words) {
    uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
    const uint64_t counter = group * LANES;  // of the first lane; all have the same high half
    words[0] = (uint32_t)counter + Words{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words[1] = (uint32_t)(counter >> 32) + Words{};
    words[2] = words[3] = Words{};
    for (int round = 0; round < 10; round++) {
        const Product first = product(words[0], 0xD2511F53u), second = product(words[2], 0xCD9E8D57u);
        words[0] = second.high ^ words[1] ^ key_0;
        words[1] = second.low;
        words[2] = first.high ^ words[3] ^ key_1;
        words[3] = first.low;
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
}

inline Floats read(const float* from) { return load<Floats>(from); }
inline Floats read(const Bits* from) { return from_bf16(from); }
inline void write(float* to, Floats value) { store(to, value); }
inline void write(Bits* to, Floats value) { to_bf16(to, value); }

template <class Value>
void drop(const Value* from, Value* to, int64_t count, uint64_t seed, uint32_t threshold, float scale, int threads) {
    const int64_t groups = (count + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        Words words[WORDS];
        philox(seed, group, words);
        for (long w = 0; w < WORDS; w++) {
            const int64_t at = group * GROUP + w * LANES, left = count - at;
            const Ints keeps = words[w] >= threshold;
            if (left >= LANES) {
                write(to + at, (Floats)((Ints)(read(from + at) * scale) & keeps));
            } else if (left > 0) {
                Value some[LANES] = {};
                std::memcpy(some, from + at, sizeof(Value) * left);
                write(some, (Floats)((Ints)(read(some) * scale) & keeps));
                std::memcpy(to + at, some, sizeof(Value) * left);
            }
        }
    }
}

}  // namespace

extern "C" {

void elman_drop_float(
    const float* from, float* to, int64_t count, uint64_t seed, uint32_t threshold, float scale, int threads) {
    drop(from, to, count, seed, threshold, scale, threads);
}

void elman_drop_bfloat16(
    const Bits* from, Bits* to, int64_t count, uint64_t seed, uint32_t threshold, float scale, int threads) {
    drop(from, to, count, seed, threshold, scale, threads);
}

}
