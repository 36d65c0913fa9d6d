// Vectors of sixteen lanes, which every compiler with vector extensions makes of any registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr long LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

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
inline Floats select(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

}  // namespace
