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
// Products take vdpbf16ps where the compiler may use it. Elsewhere the same source computes the
// same with vectors of any width: slowly, but enough for tests.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <atomic>
#include <new>
#include <utility>
#include <omp.h>
#include <sched.h>
#if defined(__AVX512BF16__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#define ELMAN_BF16 1
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

void product(long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    (n == 4 ? product<4> : n == 3 ? product<3> : n == 2 ? product<2> : product<1>)(a, a_stride, w, pairs, c, rows);
}

inline Bits bf16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

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
    int64_t threads, batch, steps, hidden, panel;
    const float* weight_hh;  // (gates H, H)
    const float* bias;       // (columns P)
    const int64_t* tokens;   // (T, B), or null: which row of input
    const float* table;      // (V, gates P), with tokens
    const Bits* input;       // (T, B, gates P) bfloat16, without
    float* h;                // (B, P): in the state before, out the one after
    float* c;                // (B, P) for evaluation, (T + 1, B, P) for training
    Bits* outputs;           // (T + 1, B, P) bfloat16: h before and after every step
    Bits* saved;             // (T, B, columns P) half: what backward needs
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

inline long padded(const Window& w) { return (w.hidden + LANES - 1) / LANES * LANES; }

// Where a thread works: its panels, each of some vectors of units.
struct Share {
    long units, panel, first, last;

    Share(const Window& w, long width, int me, int team) {
        units = padded(w);
        panel = width;
        const long panels = (units / LANES + panel - 1) / panel;
        first = panels * me / team;
        last = panels * (me + 1) / team;
    }
    long begin(long p) const { return p * panel * LANES; }
    long vectors(long p) const {
        const long left = units / LANES - p * panel;
        return left < panel ? left : panel;
    }
};

// W_hh for the forward product: per panel (units / 2, vectors × gates, 16, 2).
void pack_forward(const Window& w, const Share& share, long gates, Bits* to) {
    const long h = w.hidden;
    for (long p = share.first; p < share.last; p++) {
        const long n = share.vectors(p) * gates;
        for (long j = 0; j < n; j++) {
            const long unit = share.begin(p) + j / gates * LANES, gate = j % gates;
            for (long lane = 0; lane < LANES; lane++) {
                const float* row = w.weight_hh + (gate * h + unit + lane) * h;
                const bool real = unit + lane < h;
                for (long k = 0; k < share.units; k++)
                    to[((k / 2) * n + j) * 2 * LANES + lane * 2 + k % 2] = real && k < h ? bf16_of(row[k]) : 0;
            }
        }
        to += share.units * n * LANES;
    }
}

// Its transpose for the backward product: per panel (gates × units / 2, vectors, 16, 2).
void pack_backward(const Window& w, const Share& share, long gates, Bits* to) {
    const long h = w.hidden;
    for (long p = share.first; p < share.last; p++) {
        const long n = share.vectors(p);
        for (long k = 0; k < gates * share.units; k++) {
            const long gate = k / share.units, unit = k % share.units;
            const float* row = w.weight_hh + (gate * h + unit) * h;
            for (long j = 0; j < n * LANES; j++) {
                const long column = share.begin(p) + j;
                to[(k / 2) * n * 2 * LANES + j * 2 + k % 2] = unit < h && column < h ? bf16_of(row[column]) : 0;
            }
        }
        to += gates * share.units * n * LANES;
    }
}

// Cells ------------------------------------------------------------------------------------

// Each tells how many gates the recurrent product has, and how many columns are saved; which
// column is the first of the recurrent ones; and whether the gradient of h goes past the product.
// ``x`` is the input's row and ``s`` the sums, one vector of each gate.

template <bool RELU>
struct Rnn {
    static constexpr int gates = 1, columns = 1, recurrent = 0;
    static constexpr bool has_c = false, carries = false;

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

    static void backward(const Window& w, long, long at, long units, long, long unit, Floats dh, Floats* d) {
        d[0] = dh * from_half(w.saved + at * units + unit);
    }
};

struct Lstm {
    static constexpr int gates = 4, columns = 4, recurrent = 0;
    static constexpr bool has_c = true, carries = false;

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

    static void backward(const Window& w, long, long at, long units, long row, long unit, Floats dh, Floats* d) {
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
    static constexpr bool has_c = false, carries = true;

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
            to_half(saved + 3 * units, product);
        }
    }

    static void backward(const Window& w, long, long at, long units, long row, long unit, Floats dh, Floats* d) {
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

constexpr long ROWS = 96;  // at a time: their sums fit into L1 beside the weights that pass through

template <class Cell, bool TABLE>
inline Floats input_at(const Window& w, long at, long column) {
    if (TABLE) return load<Floats>(w.table + w.tokens[at] * Cell::gates * padded(w) + column);
    return from_bf16(w.input + at * Cell::gates * padded(w) + column);
}

template <class Cell, bool TABLE>
void forward(const Window& w) {
    constexpr long gates = Cell::gates;
    const long units = padded(w), batch = w.batch;
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        const Share share(w, w.panel, me, team);
        const long mine = (share.last - share.first) * share.panel * LANES;
        const size_t weights_size = sizeof(Bits) * gates * units * mine;
        Bits* weights = (Bits*)scratch.take(weights_size + sizeof(float) * ROWS * 4 * LANES);
        float* sums = (float*)((char*)weights + weights_size);
        pack_forward(w, share, gates, weights);
        for (long row = 0; row < batch; row++)
            for (long p = share.first; p < share.last; p++)
                for (long v = 0; v < share.vectors(p); v++) {
                    const long at = row * units + share.begin(p) + v * LANES;
                    to_bf16(w.outputs + at, load<Floats>(w.h + at));
                }
        barrier.wait(team);
        for (long t = 0; t < w.steps; t++) {
            const Bits* panel_weights = weights;
            for (long p = share.first; p < share.last; p++) {
                const long vectors = share.vectors(p), n = vectors * gates;
                for (long begin = 0; begin < batch; begin += ROWS) {
                    const long end = begin + ROWS < batch ? begin + ROWS : batch;
                    for (long v = 0; v < vectors; v++) {
                        const long unit = share.begin(p) + v * LANES;
                        Floats bias[gates];
                        for (long g = 0; g < gates; g++) bias[g] = load<Floats>(w.bias + (Cell::recurrent + g) * units + unit);
                        for (long row = begin; row < end; row++)
                            for (long g = 0; g < gates; g++) {
                                Floats sum = bias[g];
                                // The GRU's n takes its input after the product.
                                if (Cell::recurrent == 0 || g < 2)
                                    sum += input_at<Cell, TABLE>(w, t * batch + row, (Cell::recurrent + g) * units + unit);
                                store(sums + ((row - begin) * n + v * gates + g) * LANES, sum);
                            }
                    }
                    product(n, w.outputs + (t * batch + begin) * units, units, panel_weights, units / 2, sums, end - begin);
                    for (long v = 0; v < vectors; v++) {
                        const long unit = share.begin(p) + v * LANES;
                        const Floats bias = load<Floats>(w.bias + unit);
                        for (long row = begin; row < end; row++) {
                            const long at = t * batch + row;
                            Floats x = bias;
                            if (Cell::recurrent) x += input_at<Cell, TABLE>(w, at, unit);
                            Cell::forward(w, t, at, units, row, unit, sums + ((row - begin) * n + v * gates) * LANES, x);
                        }
                    }
                }
                panel_weights += units * n * LANES;
            }
            barrier.wait(team);
        }
    }
}

template <class Cell, bool TABLE>
void backward(const Window& w) {
    constexpr long gates = Cell::gates, columns = Cell::columns;
    const long units = padded(w), batch = w.batch;
    Barrier barrier;
#pragma omp parallel num_threads(w.threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        const Share share(w, w.panel, me, team);
        const long mine = (share.last - share.first) * share.panel * LANES;
        const size_t weights_size = sizeof(Bits) * gates * units * mine;
        Bits* weights = (Bits*)scratch.take(weights_size + sizeof(float) * ROWS * 4 * LANES);
        float* sums = (float*)((char*)weights + weights_size);
        pack_backward(w, share, gates, weights);
        // The step before the first has no gates: there only the state's gradient is finished.
        for (long t = w.steps - 1; t >= (w.wants_d_h ? -1 : 0); t--) {
            const Bits* panel_weights = weights;
            for (long p = share.first; p < share.last; p++) {
                const long n = share.vectors(p);
                for (long begin = 0; begin < batch; begin += ROWS) {
                    const long end = begin + ROWS < batch ? begin + ROWS : batch;
                    for (long row = begin; row < end; row++)
                        for (long v = 0; v < n; v++) {
                            const long unit = share.begin(p) + v * LANES;
                            Floats sum{};
                            if (Cell::carries || t == w.steps - 1) sum = load<Floats>(w.d_h + row * units + unit);
                            if (t >= 0 && w.d_outputs) sum += from_bf16(w.d_outputs + (t * batch + row) * units + unit);
                            store(sums + ((row - begin) * n + v) * LANES, sum);
                        }
                    if (t < w.steps - 1) {
                        const Bits* after = w.gates + ((t + 1) * batch + begin) * columns * units + Cell::recurrent * units;
                        product(n, after, columns * units, panel_weights, gates * units / 2, sums, end - begin);
                    }
                    for (long v = 0; v < n; v++) {
                        const long unit = share.begin(p) + v * LANES;
                        if (t < 0) {
                            for (long row = begin; row < end; row++)
                                store(w.d_h + row * units + unit, load<Floats>(sums + ((row - begin) * n + v) * LANES));
                            continue;
                        }
                        Floats d_bias[columns];
                        for (long g = 0; g < columns; g++) d_bias[g] = load<Floats>(w.d_bias + g * units + unit);
                        for (long row = begin; row < end; row++) {
                            const long at = t * batch + row;
                            Floats d[columns];
                            Cell::backward(w, t, at, units, row, unit, load<Floats>(sums + ((row - begin) * n + v) * LANES), d);
                            for (long g = 0; g < columns; g++) {
                                to_bf16(w.gates + (at * columns + g) * units + unit, d[g]);
                                d_bias[g] += d[g];
                            }
                            if (TABLE)
                                for (long g = 0; g < gates; g++) {
                                    float* sum = w.d_table + (w.tokens[at] * gates + g) * units + unit;
                                    store(sum, load<Floats>(sum) + d[g]);
                                }
                        }
                        for (long g = 0; g < columns; g++) store(w.d_bias + g * units + unit, d_bias[g]);
                    }
                }
                panel_weights += gates * units * n * LANES;
            }
            barrier.wait(team);
        }
    }
}

template <class Cell>
int run(const Window& w, bool is_forward) {
    if (is_forward) (w.tokens ? forward<Cell, true> : forward<Cell, false>)(w);
    else (w.tokens ? backward<Cell, true> : backward<Cell, false>)(w);
    return 0;
}

}  // namespace

extern "C" {

void elman_rnn_tanh(const Window* w, int is_forward) { run<Rnn<false>>(*w, is_forward); }
void elman_rnn_relu(const Window* w, int is_forward) { run<Rnn<true>>(*w, is_forward); }
void elman_lstm(const Window* w, int is_forward) { run<Lstm>(*w, is_forward); }
void elman_gru(const Window* w, int is_forward) { run<Gru>(*w, is_forward); }

}
