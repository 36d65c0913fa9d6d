// Recurrent layers over a whole window, forward and backward, with bfloat16 products.
//
// A step is one product (B × H)·(H × gates), too small for a matrix library to be quick at, and
// then a few cheap functions of every element. Here the two are one loop: each thread owns some
// of the hidden units, with all their gates, and keeps its share of the weights in its own cache
// for the whole window; what the threads exchange after a step is h (or, backward, the gates'
// gradients), rounded to bfloat16. Sums are in float32 and so is everything that is carried from
// step to step. A unit's arithmetic is the same whichever thread does it, so that results do not
// depend on the number of threads.
//
// Everything is time-major. P is the hidden size padded to a multiple of 16, with units whose
// weights and states are zero. Gates lie side by side in columns of P: i f g o for the LSTM, and
// for the GRU n r z, then W_hn h + b_hn, so that both the input's gates and the recurrent ones
// are neighbours; only weight_hh is in torch's order.
//
// Products take the processor's matrix tiles where it has them, else vdpbf16ps where the compiler
// may use it. Elsewhere the same source computes the same with vectors of any width: slowly, but
// enough for tests.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <omp.h>
#include <sched.h>
#if defined(__AVX512BF16__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#define ELMAN_BF16 1
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define ELMAN_TILES 1
#endif
#endif

namespace {

// Sixteen lanes ----------------------------------------------------------------------------

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
    for (long k = 0; k < pairs; k += DEPTH) {
        const long depth = pairs - k < DEPTH ? pairs - k : DEPTH;
        for (long i = 0; i < tiles; i++) {
            const long begin = rows * i / tiles, end = rows * (i + 1) / tiles;
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

#ifdef ELMAN_TILES
// The kernel saves tiles only of processes that have asked for them.
bool tiles_allowed() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return allowed;
}

thread_local long configured = 0;  // rows of the two tiles of A

void configure(long upper, long lower) {
    if (configured == upper * 100 + lower) return;
    configured = upper * 100 + lower;
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; tile++) {
        shape.bytes[tile] = 4 * TILE;
        shape.rows[tile] = tile > 5 ? TILE : tile == 2 || tile == 3 || tile == 5 ? std::max<long>(lower, 1) : upper;
    }
    _tile_loadconfig(&shape);
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
bool tiles_allowed() { return false; }
void release_tiles() {}
void tile_product(long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    vector_product(n, a, a_stride, w, pairs, c, rows);
}
#endif

// Threads ----------------------------------------------------------------------------------

struct Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};

    void wait(int team) {
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 1000) sched_yield();  // the other may be waiting for this very core
        }
    }
};

// Memory that a thread keeps from call to call: fresh pages cost as much as a step.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;

    char* take(size_t wanted) {
        if (wanted > size) {
            std::free(memory);
            size = (wanted + 4095) / 4096 * 4096;
            memory = (char*)std::aligned_alloc(4096, size);
            if (!memory) throw std::bad_alloc();
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch;

}  // namespace

// A window, as Python describes it. Pointers that a call does not need are null.
struct Window {
    int64_t threads, batch, steps, hidden, panel, tiles;
    const float* weight_hh;  // (gates H, H)
    const float* bias;       // (columns P)
    const int64_t* tokens;   // (T, B), or null: which row of input
    const float* table;      // (V, gates P), with tokens
    const Bits* input;       // (T, B, gates P) bfloat16, without
    float* h;                // (B, P): in the state before, out the one after
    float* c;                // (B, P) for evaluation, (T + 1, B, P) for training; the textbook's GRU keeps z there
    Bits* outputs;           // (T + 1, B, P) bfloat16: h before and after every step
    Bits* saved;             // (T, B, columns P) half: what backward needs
    Bits* reset;             // (T, B, P) bfloat16: r ⊙ h, where it is what is multiplied
    // Backward only.
    Bits* gates;             // (T, B, columns P) bfloat16: gradients of the gates; may be saved itself
    const Bits* d_outputs;   // (T, B, P) bfloat16, or null
    float* d_h;              // (B, P): in the gradient of the last state, out of the first
    float* d_c;
    float* d_table;          // (V, gates P), with tokens
    float* d_bias;           // (columns P)
    int64_t wants_d_h;       // whether the first state's gradient is wanted
};

namespace {

constexpr long ROWS = 96;  // at a time: their sums fit into L1 beside the weights that pass through

inline long padded(const Window& w) { return (w.hidden + LANES - 1) / LANES * LANES; }

// What a thread works on: its panels, each of some vectors of units, with their weights.
struct Worker {
    const Window& w;
    Barrier& barrier;
    int team;
    long units, first, last;  // panels
    Bits* weights;
    float* sums;

    Worker(const Window& window, Barrier& shared, long gates) : w(window), barrier(shared) {
        team = omp_get_num_threads();
        units = padded(w);
        const long panels = (units / LANES + w.panel - 1) / w.panel;
        first = panels * omp_get_thread_num() / team;
        last = panels * (omp_get_thread_num() + 1) / team;
        const size_t size = sizeof(Bits) * gates * units * (last - first) * w.panel * LANES;
        weights = (Bits*)scratch.take(size + sizeof(float) * ROWS * 4 * LANES);
        sums = (float*)((char*)weights + size);
    }
    long begin(long p) const { return p * w.panel * LANES; }
    long vectors(long p) const { return std::min<long>(units / LANES - p * w.panel, w.panel); }
    ~Worker() { release_tiles(); }
    void wait() { barrier.wait(team); }

    // Sixteen weights of one unit's gate, from that column on: zeros beyond the real ones.
    Floats weights_at(long gate, long unit, long column) const {
        const long h = w.hidden;
        const float* from = w.weight_hh + (gate * h + unit) * h + column;
        Floats values{};
        if (unit >= h || column >= h) return values;
        if (column + LANES <= h) return load<Floats>(from);
        std::memcpy(&values, from, sizeof(float) * (h - column));
        return values;
    }

    // Gates of weight_hh for the forward product: per panel (units / 2, vectors × gates, 16, 2).
    Bits* pack_forward(long first_gate, long gates, Bits* to) const {
        for (long p = first; p < last; p++) {
            const long n = vectors(p) * gates;
            for (long j = 0; j < n; j++)
                for (long k = 0; k < units; k += LANES)
                    for (long lane = 0; lane < LANES; lane++) {
                        Bits row[LANES];
                        to_bf16(row, weights_at(first_gate + j % gates, begin(p) + j / gates * LANES + lane, k));
                        for (long pair = 0; pair < LANES / 2; pair++)
                            std::memcpy(to + ((k / 2 + pair) * n + j) * 2 * LANES + lane * 2, row + 2 * pair, 4);
                    }
            to += units * n * LANES;
        }
        return to;
    }

    // Their transpose for the backward product: per panel (gates × units / 2, vectors, 16, 2).
    Bits* pack_backward(long first_gate, long gates, Bits* to) const {
        for (long p = first; p < last; p++) {
            for (long k = 0; k < gates * units; k += 2)
                for (long v = 0; v < vectors(p); v++, to += 2 * LANES) {
                    Bits even[LANES], odd[LANES];
                    const long gate = first_gate + k / units, column = begin(p) + v * LANES;
                    to_bf16(even, weights_at(gate, k % units, column));
                    to_bf16(odd, weights_at(gate, k % units + 1, column));
                    const Words low = __builtin_convertvector(load<Halves>(even), Words);
                    store(to, low | __builtin_convertvector(load<Halves>(odd), Words) << 16);
                }
        }
        return to;
    }

    // One product and what surrounds it, over the thread's units and all rows. ``prepare`` writes
    // what is added to the product, ``finish`` takes the sums: both for one vector of units and
    // some rows, whose sums are ``stride`` apart. Without ``a`` there is no product.
    template <class Prepare, class Finish>
    void sweep(
        long gates, const Bits* a, long a_stride, const Bits* panel, long pairs, Prepare prepare, Finish finish) {
        for (long p = first; p < last; p++) {
            const long n = vectors(p) * gates, stride = n * LANES;
            for (long row = 0; row < w.batch; row += ROWS) {
                const long end = std::min<long>(row + ROWS, w.batch);
                for (long v = 0; v < vectors(p); v++)
                    prepare(begin(p) + v * LANES, row, end, sums + v * gates * LANES, stride);
                if (a) (w.tiles ? tile_product : vector_product)(n, a + row * a_stride, a_stride, panel, pairs, sums, end - row);
                for (long v = 0; v < vectors(p); v++)
                    finish(begin(p) + v * LANES, row, end, sums + v * gates * LANES, stride);
            }
            panel += 2 * pairs * stride;
        }
    }

    // The state before the window, as the first product takes it.
    void round_state() {
        for (long p = first; p < last; p++)
            for (long row = 0; row < w.batch; row++)
                for (long v = 0; v < vectors(p); v++) {
                    const long at = row * units + begin(p) + v * LANES;
                    to_bf16(w.outputs + at, load<Floats>(w.h + at));
                }
    }
};

// Cells ------------------------------------------------------------------------------------

// Each tells how many gates the recurrent product has, and how many columns are saved; which
// column is the first of the recurrent ones; and whether the gradient of h goes past the product.
// ``x`` is the input's row and ``s`` the sums, one vector of each gate.

template <bool RELU>
struct Rnn {
    static constexpr int gates = 1, columns = 1, recurrent = 0;
    static constexpr bool carries = false;

    static void forward(const Window& w, long t, long at, long units, long row, long unit, const float* s, Floats) {
        const Floats a = load<Floats>(s);
        Floats h, slope;
        if (RELU) {
            // In this order NaN stays.
            const Ints off = a < 0.0f;
            h = (Floats)((Ints)a & ~off);
            slope = (Floats)((Ints)splat(1.0f) & ~(a <= 0.0f));
        } else {
            h = tangent(a);
            slope = 1.0f - h * h;
        }
        to_bf16(w.outputs + (w.batch + at) * units + unit, h);
        if (w.saved) to_half(w.saved + at * units + unit, slope);
        if (t == w.steps - 1) store(w.h + row * units + unit, h);
    }

    static void backward(const Window& w, long at, long units, long, long unit, Floats dh, Floats* d) {
        d[0] = dh * from_half(w.saved + at * units + unit);
    }
};

struct Lstm {
    static constexpr int gates = 4, columns = 4, recurrent = 0;
    static constexpr bool carries = false;

    static void forward(const Window& w, long t, long at, long units, long row, long unit, const float* s, Floats) {
        const Floats i = sigmoid(load<Floats>(s)), f = sigmoid(load<Floats>(s + LANES));
        const Floats g = tangent(load<Floats>(s + 2 * LANES)), o = sigmoid(load<Floats>(s + 3 * LANES));
        const float* before = w.c + (w.saved ? at : row) * units + unit;
        float* after = w.c + (w.saved ? w.batch + at : row) * units + unit;
        const Floats c = f * load<Floats>(before) + i * g;
        const Floats h = o * tangent(c);
        store(after, c);
        to_bf16(w.outputs + (w.batch + at) * units + unit, h);
        if (w.saved) {
            Bits* saved = w.saved + at * 4 * units + unit;
            to_half(saved, i);
            to_half(saved + units, f);
            to_half(saved + 2 * units, g);
            to_half(saved + 3 * units, o);
        }
        if (t == w.steps - 1) store(w.h + row * units + unit, h);
    }

    static void backward(const Window& w, long at, long units, long row, long unit, Floats dh, Floats* d) {
        const Bits* saved = w.saved + at * 4 * units + unit;
        const Floats i = from_half(saved), f = from_half(saved + units);
        const Floats g = from_half(saved + 2 * units), o = from_half(saved + 3 * units);
        const Floats squashed = tangent(load<Floats>(w.c + (w.batch + at) * units + unit));
        float* carried = w.d_c + row * units + unit;
        const Floats dc = load<Floats>(carried) + dh * o * (1.0f - squashed * squashed);
        d[0] = dc * g * i * (1.0f - i);
        d[1] = dc * load<Floats>(w.c + at * units + unit) * f * (1.0f - f);
        d[2] = dc * i * (1.0f - g * g);
        d[3] = dh * squashed * o * (1.0f - o);
        store(carried, dc * f);
    }
};

struct Gru {
    static constexpr int gates = 3, columns = 4, recurrent = 1;
    static constexpr bool carries = true;

    static void forward(const Window& w, long, long at, long units, long row, long unit, const float* s, Floats x) {
        const Floats r = sigmoid(load<Floats>(s)), z = sigmoid(load<Floats>(s + LANES));
        const Floats product = load<Floats>(s + 2 * LANES);
        const Floats n = tangent(x + r * product);
        float* carried = w.h + row * units + unit;
        const Floats h = n + z * (load<Floats>(carried) - n);
        store(carried, h);
        to_bf16(w.outputs + (w.batch + at) * units + unit, h);
        if (w.saved) {
            Bits* saved = w.saved + at * 4 * units + unit;
            to_half(saved, n);
            to_half(saved + units, r);
            to_half(saved + 2 * units, z);
            to_half(saved + 3 * units, clamp(product, 65504.0f));  // the largest half
        }
    }

    static void backward(const Window& w, long at, long units, long row, long unit, Floats dh, Floats* d) {
        const Bits* saved = w.saved + at * 4 * units + unit;
        const Floats n = from_half(saved), r = from_half(saved + units);
        const Floats z = from_half(saved + 2 * units), product = from_half(saved + 3 * units);
        const Floats before = from_bf16(w.outputs + at * units + unit);
        d[0] = dh * (1.0f - z) * (1.0f - n * n);
        d[1] = d[0] * product * r * (1.0f - r);
        d[2] = dh * (before - n) * z * (1.0f - z);
        d[3] = d[0] * r;
        store(w.d_h + row * units + unit, dh * z);
    }
};

// The window -------------------------------------------------------------------------------

template <bool TABLE>
inline Floats input_at(const Window& w, long width, long at, long column) {
    if (TABLE) return load<Floats>(w.table + w.tokens[at] * width + column);
    return from_bf16(w.input + at * width + column);
}

template <class Cell, bool TABLE>
void forward(const Window& w) {
    constexpr long gates = Cell::gates;
    const long units = padded(w), width = gates * units;
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        Worker worker(w, barrier, gates);
        worker.pack_forward(0, gates, worker.weights);
        worker.round_state();
        worker.wait();
        for (long t = 0; t < w.steps; t++) {
            worker.sweep(
                gates, w.outputs + t * w.batch * units, units, worker.weights, units / 2,
                [&](long unit, long row, long end, float* s, long stride) {
                    Floats bias[gates];
                    for (long g = 0; g < gates; g++)
                        bias[g] = load<Floats>(w.bias + (Cell::recurrent + g) * units + unit);
                    for (; row < end; row++, s += stride)
                        for (long g = 0; g < gates; g++) {
                            Floats sum = bias[g];
                            const long column = Cell::recurrent + g;
                            // The GRU's last takes its input after the product, in its first column.
                            if (column < gates)
                                sum += input_at<TABLE>(w, width, t * w.batch + row, column * units + unit);
                            store(s + g * LANES, sum);
                        }
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    const Floats bias = load<Floats>(w.bias + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = t * w.batch + row;
                        Floats x = bias;
                        if (Cell::recurrent) x += input_at<TABLE>(w, width, at, unit);
                        Cell::forward(w, t, at, units, row, unit, s, x);
                    }
                });
            worker.wait();
        }
    }
}

// The gradients of one vector of units at one step: rounded, and summed into the biases' and the table's.
template <long COLUMNS, long GATES, bool TABLE>
inline void keep(const Window& w, long at, long units, long unit, long column, Floats d, Floats& d_bias) {
    to_bf16(w.gates + (at * COLUMNS + column) * units + unit, d);
    d_bias += d;
    if (TABLE && column < GATES) {
        float* sum = w.d_table + (w.tokens[at] * GATES + column) * units + unit;
        store(sum, load<Floats>(sum) + d);
    }
}

// What reaches h of step t from outside of the recurrent product.
inline Floats d_h_at(const Window& w, long t, long units, long row, long unit, bool carries) {
    Floats sum{};
    if (carries || t == w.steps - 1) sum = load<Floats>(w.d_h + row * units + unit);
    if (t >= 0 && w.d_outputs) sum += from_bf16(w.d_outputs + (t * w.batch + row) * units + unit);
    return sum;
}

template <class Cell, bool TABLE>
void backward(const Window& w) {
    constexpr long gates = Cell::gates, columns = Cell::columns;
    const long units = padded(w);
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        Worker worker(w, barrier, gates);
        worker.pack_backward(0, gates, worker.weights);
        // The step before the first has no gates: there only the state's gradient is finished.
        for (long t = w.steps - 1; t >= (w.wants_d_h ? -1 : 0); t--) {
            const Bits* after = w.gates + ((t + 1) * w.batch * columns + Cell::recurrent) * units;
            worker.sweep(
                1, t < w.steps - 1 ? after : nullptr, columns * units, worker.weights, gates * units / 2,
                [&](long unit, long row, long end, float* s, long stride) {
                    for (; row < end; row++, s += stride) store(s, d_h_at(w, t, units, row, unit, Cell::carries));
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    if (t < 0) {
                        for (; row < end; row++, s += stride) store(w.d_h + row * units + unit, load<Floats>(s));
                        return;
                    }
                    Floats d[columns], d_bias[columns];
                    for (long g = 0; g < columns; g++) d_bias[g] = load<Floats>(w.d_bias + g * units + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = t * w.batch + row;
                        Cell::backward(w, at, units, row, unit, load<Floats>(s), d);
                        for (long g = 0; g < columns; g++)
                            keep<columns, gates, TABLE>(w, at, units, unit, g, d[g], d_bias[g]);
                    }
                    for (long g = 0; g < columns; g++) store(w.d_bias + g * units + unit, d_bias[g]);
                });
            worker.wait();
        }
    }
}

// The textbook's GRU has two products a step, for n's waits for r.
template <bool TABLE>
void forward_reset_before(const Window& w) {
    const long units = padded(w), width = 3 * units;
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        Worker worker(w, barrier, 3);
        Bits* const candidate_weights = worker.pack_forward(0, 2, worker.weights);
        worker.pack_forward(2, 1, candidate_weights);
        worker.round_state();
        worker.wait();
        for (long t = 0; t < w.steps; t++) {
            const long begin = t * w.batch;
            Bits* const reset = w.reset + (w.saved ? begin * units : 0);
            worker.sweep(
                2, w.outputs + begin * units, units, worker.weights, units / 2,
                [&](long unit, long row, long end, float* s, long stride) {
                    for (; row < end; row++, s += stride)
                        for (long g = 0; g < 2; g++) {
                            const Floats bias = load<Floats>(w.bias + g * units + unit);
                            store(s + g * LANES, bias + input_at<TABLE>(w, width, begin + row, g * units + unit));
                        }
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    for (; row < end; row++, s += stride) {
                        const Floats r = sigmoid(load<Floats>(s)), z = sigmoid(load<Floats>(s + LANES));
                        to_bf16(reset + row * units + unit, r * load<Floats>(w.h + row * units + unit));
                        store(w.c + row * units + unit, z);  // until n is there
                        if (w.saved) to_half(w.saved + (begin + row) * width + unit, r);
                    }
                });
            worker.wait();
            worker.sweep(
                1, reset, units, candidate_weights, units / 2,
                [&](long unit, long row, long end, float* s, long stride) {
                    const Floats bias = load<Floats>(w.bias + 2 * units + unit);
                    for (; row < end; row++, s += stride)
                        store(s, bias + input_at<TABLE>(w, width, begin + row, 2 * units + unit));
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    for (; row < end; row++, s += stride) {
                        const Floats n = tangent(load<Floats>(s)), z = load<Floats>(w.c + row * units + unit);
                        const Floats before = load<Floats>(w.h + row * units + unit);
                        const Floats h = before + z * (n - before);
                        store(w.h + row * units + unit, h);
                        to_bf16(w.outputs + (begin + w.batch + row) * units + unit, h);
                        if (w.saved) {
                            Bits* saved = w.saved + (begin + row) * width + unit;
                            to_half(saved + units, z);
                            to_half(saved + 2 * units, n);
                        }
                    }
                });
            worker.wait();
        }
    }
}

template <bool TABLE>
void backward_reset_before(const Window& w) {
    const long units = padded(w), width = 3 * units;
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        Worker worker(w, barrier, 3);
        Bits* const candidate_weights = worker.pack_backward(0, 2, worker.weights);
        worker.pack_backward(2, 1, candidate_weights);
        for (long t = w.steps - 1; t >= (w.wants_d_h ? -1 : 0); t--) {
            const long begin = t * w.batch;
            worker.sweep(
                1, t < w.steps - 1 ? w.gates + (begin + w.batch) * width : nullptr, width, worker.weights, units,
                [&](long unit, long row, long end, float* s, long stride) {
                    for (; row < end; row++, s += stride) store(s, d_h_at(w, t, units, row, unit, true));
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    if (t < 0) {
                        for (; row < end; row++, s += stride) store(w.d_h + row * units + unit, load<Floats>(s));
                        return;
                    }
                    Floats d_bias_z = load<Floats>(w.d_bias + units + unit);
                    Floats d_bias_n = load<Floats>(w.d_bias + 2 * units + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = begin + row;
                        const Bits* saved = w.saved + at * width + unit;
                        const Floats z = from_half(saved + units), n = from_half(saved + 2 * units);
                        const Floats before = from_bf16(w.outputs + at * units + unit), dh = load<Floats>(s);
                        keep<3, 3, TABLE>(w, at, units, unit, 1, dh * (n - before) * z * (1.0f - z), d_bias_z);
                        keep<3, 3, TABLE>(w, at, units, unit, 2, dh * z * (1.0f - n * n), d_bias_n);
                        store(w.d_h + row * units + unit, dh * (1.0f - z));
                    }
                    store(w.d_bias + units + unit, d_bias_z);
                    store(w.d_bias + 2 * units + unit, d_bias_n);
                });
            worker.wait();
            if (t < 0) break;
            worker.sweep(
                1, w.gates + begin * width + 2 * units, width, candidate_weights, units / 2,
                [&](long, long row, long end, float* s, long stride) {
                    for (; row < end; row++, s += stride) store(s, Floats{});
                },
                [&](long unit, long row, long end, const float* s, long stride) {
                    Floats d_bias = load<Floats>(w.d_bias + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = begin + row;
                        const Floats r = from_half(w.saved + at * width + unit), d_reset = load<Floats>(s);
                        const Floats before = from_bf16(w.outputs + at * units + unit);
                        keep<3, 3, TABLE>(w, at, units, unit, 0, d_reset * before * r * (1.0f - r), d_bias);
                        float* carried = w.d_h + row * units + unit;
                        store(carried, load<Floats>(carried) + d_reset * r);
                    }
                    store(w.d_bias + unit, d_bias);
                });
            worker.wait();
        }
    }
}

template <class Cell>
void run(const Window& w, bool is_forward) {
    if (is_forward) (w.tokens ? forward<Cell, true> : forward<Cell, false>)(w);
    else (w.tokens ? backward<Cell, true> : backward<Cell, false>)(w);
}

}  // namespace

extern "C" {

int elman_has_tiles() { return tiles_allowed(); }

void elman_rnn_tanh(const Window* w, int is_forward) { run<Rnn<false>>(*w, is_forward); }
void elman_rnn_relu(const Window* w, int is_forward) { run<Rnn<true>>(*w, is_forward); }
void elman_lstm(const Window* w, int is_forward) { run<Lstm>(*w, is_forward); }
void elman_gru(const Window* w, int is_forward) { run<Gru>(*w, is_forward); }

void elman_gru_reset_before(const Window* w, int is_forward) {
    if (is_forward) (w->tokens ? forward_reset_before<true> : forward_reset_before<false>)(*w);
    else (w->tokens ? backward_reset_before<true> : backward_reset_before<false>)(*w);
}

}
