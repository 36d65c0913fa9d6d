// Products of bfloat16 matrices with sums in float32: C += A · W, where W holds for every pair of rows
// all its columns, the two values of a column side by side.
//
// They take the processor's matrix tiles where it has them, else vdpbf16ps where the compiler may use
// it, else vectors of any width: slowly, but enough for tests.
#pragma once

#include <algorithm>
#include <utility>

#include "lanes.h"
#include "tiles.h"
#if defined(ELMAN_TILES) && defined(ELMAN_BF16) && defined(__AMX_BF16__)
#define ELMAN_TILE_PRODUCT 1
#endif

namespace {

// Products ---------------------------------------------------------------------------------

// C (M × 16 N) += A (M × 2 pairs) · W, where W holds for every pair of rows N × 16 columns, the
// two values of a column side by side.
template <int M, int N>
void tile(const Bits* a, long a_stride, const Bits* w, long pairs, float* c) {
    constexpr long c_stride = N * LANES;
#ifdef ELMAN_BF16
    __m512 sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = _mm512_loadu_ps(c + m * c_stride + n * LANES);
    for (long k = 0; k < pairs; k++) {
        __m512bh columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) columns[n] = (__m512bh)_mm512_loadu_si512(w + (k * N + n) * 2 * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + m * a_stride + 2 * k));
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], row, columns[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) _mm512_storeu_ps(c + m * c_stride + n * LANES, sums[m][n]);
#else
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            Floats sum = load<Floats>(c + m * c_stride + n * LANES);
            for (long k = 0; k < pairs; k++) {
                const Words columns = load<Words>(w + (k * N + n) * 2 * LANES);
                float first, second;
                const uint32_t row_first = (uint32_t)a[m * a_stride + 2 * k] << 16;
                const uint32_t row_second = (uint32_t)a[m * a_stride + 2 * k + 1] << 16;
                std::memcpy(&first, &row_first, 4);
                std::memcpy(&second, &row_second, 4);
                sum += first * (Floats)(columns << 16);
                sum += second * (Floats)(columns & 0xffff0000u);
            }
            store(c + m * c_stride + n * LANES, sum);
        }
#endif
}

typedef void (*Tile)(const Bits*, long, const Bits*, long, float*);

template <int N, int... M>
inline Tile tile_of(long rows, std::integer_sequence<int, M...>) {
    static constexpr Tile tiles[] = {tile<M + 1, N>...};
    return tiles[rows - 1];
}

constexpr long DEPTH = 256;  // pairs at a time: with it a panel of weights stays in L2, rows of A in L1

// C (rows × 16 N) += A (rows × 2 pairs) · W. As many sums as registers hold, of nearly equal rows.
template <int N>
void product(const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    constexpr int most = N == 4 ? 6 : N == 3 ? 8 : N == 2 ? 10 : 12;
    const long tiles = (rows + most - 1) / most;
    // Few products a sum, and more sums than stay in L1: the next tile's come while this one is computed.
    const bool fetches = pairs <= 64 && rows * N * LANES * sizeof(float) > (1 << 15);
    for (long k = 0; k < pairs; k += DEPTH) {
        const long depth = pairs - k < DEPTH ? pairs - k : DEPTH;
        for (long i = 0; i < tiles; i++) {
            const long begin = rows * i / tiles, end = rows * (i + 1) / tiles;
            if (fetches)
                for (long j = end * N; j < rows * (i + 2) / tiles * N; j++) __builtin_prefetch(c + j * LANES, 1);
            tile_of<N>(end - begin, std::make_integer_sequence<int, most>())(
                a + begin * a_stride + 2 * k, a_stride, w + k * N * 2 * LANES, depth, c + begin * N * LANES);
        }
    }
}

void vector_product(long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    (n == 4 ? product<4> : n == 3 ? product<3> : n == 2 ? product<2> : product<1>)(a, a_stride, w, pairs, c, rows);
}

// Tiles ------------------------------------------------------------------------------------

// Matrix registers of sixteen rows of 64 bytes: 0 to 3 hold two by two tiles of C, 4 and 5 the rows
// of A, 6 and 7 the columns of W, which lie in memory as the instruction wants them.

constexpr long TILE = 16;  // rows of a tile, and pairs in one of its rows
constexpr long TILES_DEEP = 8;  // at a time: with so many, the rows of A and the weights beside them stay in L1

#ifdef ELMAN_TILE_PRODUCT
bool has_tile_product() { return tiles_allowed(); }

thread_local long configured = 0;  // rows of the two tiles of A

void configure(long upper, long lower) {
    if (configured == upper * 100 + lower) return;
    configured = upper * 100 + lower;
    TileShapes shapes;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = upper;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = std::max<long>(lower, 1);
    shapes.load();
}

void release_tiles() {
    if (configured) _tile_release();
    configured = 0;
}

// C (one or two tiles of rows × as many of columns) += A · W, all strides in bytes.
template <bool LOWER, bool RIGHT>
void tiles(const Bits* a, long a_stride, const Bits* w, long w_stride, long depth, float* c, long c_stride) {
    const char* const lower_a = (const char*)a + TILE * a_stride;
    char* const lower_c = (char*)c + TILE * c_stride;
    settle_memory();
    _tile_loadd(0, c, c_stride);
    if (RIGHT) _tile_loadd(1, c + LANES, c_stride);
    if (LOWER) _tile_loadd(2, lower_c, c_stride);
    if (LOWER && RIGHT) _tile_loadd(3, lower_c + 4 * LANES, c_stride);
    for (long k = 0; k < depth; k++) {
        _tile_loadd(4, a + k * 2 * TILE, a_stride);
        _tile_loadd(6, (const char*)w + k * TILE * w_stride, w_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (RIGHT) {
            _tile_loadd(7, (const char*)w + k * TILE * w_stride + 4 * LANES, w_stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (LOWER) {
            _tile_loadd(5, lower_a + k * 4 * TILE, a_stride);
            _tile_dpbf16ps(2, 5, 6);
            if (RIGHT) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_stride);
    if (RIGHT) _tile_stored(1, c + LANES, c_stride);
    if (LOWER) _tile_stored(2, lower_c, c_stride);
    if (LOWER && RIGHT) _tile_stored(3, lower_c + 4 * LANES, c_stride);
}

// The same as ``vector_product``. What is left of the pairs after whole tiles is its work.
void tile_product(long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    const long whole = pairs / TILE, done = whole * TILE, c_stride = n * LANES;
    for (long k = 0; k < whole; k += TILES_DEEP) {
        const long depth = std::min(whole - k, TILES_DEEP);
        for (long row = 0; row < rows; row += 2 * TILE) {
            const long upper = std::min(rows - row, TILE), lower = std::min(rows - row - upper, TILE);
            configure(upper, lower);
            for (long v = 0; v < n; v += 2) {
                const bool right = v + 1 < n;
                (lower ? right ? tiles<true, true> : tiles<true, false>
                       : right ? tiles<false, true> : tiles<false, false>)(
                    a + row * a_stride + k * 2 * TILE, 2 * a_stride, w + (k * TILE * n + v) * 2 * LANES, 4 * c_stride,
                    depth, c + row * c_stride + v * LANES, 4 * c_stride);
            }
        }
    }
    if (done < pairs) vector_product(n, a + 2 * done, a_stride, w + done * 2 * c_stride, pairs - done, c, rows);
}
#else
bool has_tile_product() { return false; }
void release_tiles() {}
void tile_product(long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    vector_product(n, a, a_stride, w, pairs, c, rows);
}
#endif

}  // namespace
