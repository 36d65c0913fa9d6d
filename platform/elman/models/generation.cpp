// Generation of text: recurrent layers, output layer and sampler, many tokens a call.
//
// A token of one stream multiplies every weight once, so that its time is that of reading the
// weights. They are held in 16 bits, as whole multiples of a 32,512th of their row's largest, and so
// are the activations; sums of their products are sums of integers, and everything between products
// is in float32. So a text depends neither on the number of threads nor on how many others are
// generated beside it.
//
// Both factors are split into two bytes: of the four products that of both lower ones, which is
// as small as what rounding to 16 bits costs, is left out. The processor's dot products of bytes
// (VNNI) take one stream, its matrix tiles (AMX) many. Elsewhere the same source computes the
// same with vectors of any width.
//
// Threads share the units of a layer, with all their gates, and meet after each.
// P is a size padded to a multiple of 16, K one padded to a multiple of 64, with zeros.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <omp.h>

#include "threads.h"
#include "tiles.h"
#include "vectors.h"
#if defined(__AVX512VNNI__) && !defined(ELMAN_PORTABLE)
#include <immintrin.h>
#define ELMAN_VNNI 1
#if defined(ELMAN_TILES) && defined(__AMX_INT8__)
#define ELMAN_TILE_PRODUCT 1
#endif
#endif

namespace {

// Sixteen lanes ----------------------------------------------------------------------------

typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Floats floats(Ints value) { return __builtin_convertvector(value, Floats); }

#ifdef ELMAN_VNNI
inline Floats rounded(Floats value) { return (Floats)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
inline Floats scaled(Floats value, Floats power) { return (Floats)_mm512_scalef_ps((__m512)value, (__m512)power); }
inline Floats clamp(Floats value, float low, float high) {
    return (Floats)_mm512_min_ps(_mm512_max_ps((__m512)value, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}
inline Floats reciprocal(Floats value) {  // a guess of 14 bits, doubled by Newton's step
    const Floats guess = (Floats)_mm512_rcp14_ps((__m512)value);
    return guess * (2.0f - value * guess);
}
#else
inline Floats rounded(Floats value) { return (value + 0x1.8p23f) - 0x1.8p23f; }
inline Floats scaled(Floats value, Floats power) {
    return value * (Floats)((__builtin_convertvector(power, Ints) + 127) << 23);
}
inline Floats clamp(Floats value, float low, float high) {
    value = select(value < low, Floats{} + low, value);
    return select(value > high, Floats{} + high, value);
}
inline Floats reciprocal(Floats value) { return 1.0f / value; }
#endif

inline float largest(Floats value) {
    float most = value[0];
    for (int lane = 1; lane < LANES; lane++) most = value[lane] > most ? value[lane] : most;
    return most;
}

inline float total(Floats value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

// exp(x) for −87 to 87, and that of the nearer end beyond: a power of two, whose whole part goes
// to the exponent; the rest by a polynomial that is good to 8e-8 of the value.
inline Floats exponential(Floats x) {
    const Floats power = clamp(x * 1.44269504f, -126.0f, 126.0f), whole = rounded(power), rest = power - whole;
    Floats p = 1.327609783e-3f * rest + 9.675419799e-3f;
    p = p * rest + 5.550713326e-2f;
    p = p * rest + 2.402212214e-1f;
    p = p * rest + 6.931469678e-1f;
    p = p * rest + 1.0f;
    return scaled(p, whole);
}
inline Floats sigmoid(Floats x) { return reciprocal(1.0f + exponential(-x)); }
inline Floats tangent(Floats x) { return 1.0f - 2.0f * reciprocal(1.0f + exponential(2.0f * x)); }
inline Floats positive(Floats x) { return select(x < 0.0f, sigmoid(x), x + 0.5f); }  // of the minimal cells

// Adds the products of four neighbouring bytes, unsigned times signed, to each lane.
inline Ints dot(Ints sum, Ints a, Ints b) {
#ifdef ELMAN_VNNI
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    // A product of two bytes fits into 16 bits: the even ones, then the odd ones.
    const Shorts even = (Shorts)(a & 0x00ff00ff) * (((Shorts)b << 8) >> 8);
    const Shorts odd = (Shorts)((a >> 8) & 0x00ff00ff) * ((Shorts)b >> 8);
    return sum + (((Ints)even << 16) >> 16) + ((Ints)even >> 16) + (((Ints)odd << 16) >> 16) + ((Ints)odd >> 16);
#endif
}

}  // namespace

// What Python describes --------------------------------------------------------------------

// Rows are ordered by vectors of units, then gates.
struct Matrix {
    int8_t* planes;    // (vectors, K / 4, 2, 16, 4): the upper byte, then the lower, signed both
    float* scales;     // (vectors, 16): what one is worth
    int32_t* offsets;  // (vectors, 2, 16): what corrects the sums for activations' being unsigned
    int64_t depth;     // K
    int64_t gates;
};

struct Stage {
    Matrix input, recurrent;  // of no depth where there is no product
    const float* table;  // (inputs, units / 16, gates, 16): the product of every input, instead of that; or null
    const float* bias;   // (units / 16, columns, 16)
};

struct Layer {
    int64_t kind, units;  // units are not padded
    Stage stages[2];      // the textbook's GRU has r and z in the first, n in the second
    float *h, *c;         // (B, P)
    const float *gain, *shift;  // (P) of the normalisation, or null
    float epsilon;
    float bound;       // of |h|; 0 where there is none
    int64_t residual;  // whether the layer's input is added to its output
};

struct Generation {
    int64_t threads, batch, steps, num_layers, vocabulary;
    Layer* layers;
    Matrix output;
    const float* output_bias;  // (V padded): −inf forbids
    const float* embedding;    // (inputs, P), where it is needed
    int64_t embedding_size;    // P of it
    float* logits;             // (B, V padded): in those to draw the first tokens from, out those after the last
    const double* uniforms;    // (steps, B)
    int64_t* ids;              // (steps, B): out
    uint8_t* seen;             // (B, V) with a repetition penalty, or null
    float temperature, top_p, min_p, repetition_penalty;  // top_p 1 and min_p 0 drop nothing
    int64_t top_k;             // 0 for all
};

namespace {

enum Kind { RNN_TANH, RNN_RELU, LSTM, GRU, GRU_RESET_BEFORE, MINGRU, MINLSTM };

constexpr float LIMIT = 127 * 256;  // of the magnitude of a 16-bit factor: so both its bytes are in range
constexpr long ROWS = 32;           // streams at a time: two tiles, and their sums fit into L1
constexpr long MOST_ROWS = 2;       // that are quicker one by one than as a tile of sixteen
constexpr int PAIR = 2;             // that share what is read of the weights, where there are no tiles
constexpr long WIDEST = 4;          // vectors of outputs at a time: all their sums fit into registers

inline long padded(long size, long multiple) { return (size + multiple - 1) / multiple * multiple; }

// Activations -----------------------------------------------------------------------------

// Rows of 16-bit numbers, split into bytes, with 128 added to either: a·b of the processor takes unsigned ones.
struct Rows {
    uint8_t *upper, *lower;  // (rows, depth)
    float* scales;           // (rows): what one is worth
    long depth;

    void put(long row, long unit, Floats value, float inverse) const {
        const Ints bits = __builtin_convertvector(rounded(value * inverse), Ints) + (128 * 256 + 128);
        store(upper + row * depth + unit, __builtin_convertvector(bits >> 8, Bytes));
        store(lower + row * depth + unit, __builtin_convertvector(bits, Bytes));
    }
    // A whole row, in units of its largest.
    void put_row(long row, const float* values, long width) const {
        Floats most{};
        for (long i = 0; i < width; i += LANES) {
            const Floats value = load<Floats>(values + i), magnitude = select(value < 0.0f, -value, value);
            most = select(magnitude > most, magnitude, most);
        }
        const float bound = largest(most);
        for (long i = 0; i < width; i += LANES)
            put(row, i, load<Floats>(values + i), bound > 0 ? LIMIT / bound : 0.0f);
        scales[row] = bound / LIMIT;
    }
};

// Products ---------------------------------------------------------------------------------

// The sums of bytes' products, of both upper ones and of an upper and a lower, made one and added to ``to``.
inline void finish(const Matrix& m, long vector, float scale, Ints upper, Ints mixed, float* to) {
    const int32_t* offsets = m.offsets + vector * 2 * LANES;
    const Floats high = floats(upper + load<Ints>(offsets)), low = floats(mixed + load<Ints>(offsets + LANES));
    const Floats whole = high * 256.0f + low;
    store(to, load<Floats>(to) + whole * (load<Floats>(m.scales + vector * LANES) * (256.0f * scale)));
}

// R rows at once, from ``row`` on: what two rows take turns with need not be read twice.
template <int R, int N>
void row_product(const Matrix& m, long vector, const Rows& a, long row, float* sums, long stride) {
    // Of one row, two sums side by side: added up in one, each dot product would wait for the one before.
    constexpr int apart = R == 1 ? 1 : 0;
    Ints above[R][N]{}, mixed[R][N][1 + apart]{};
    const long bytes = m.depth * 2 * LANES;
    const int8_t* w = m.planes + vector * bytes;
    const uint8_t *upper = a.upper + row * a.depth, *lower = a.lower + row * a.depth;
    for (long k = 0; k < m.depth; k += 4, w += 8 * LANES) {
        Ints u[R], l[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            u[r] = Ints{} + load<int32_t>(upper + r * a.depth + k);
            l[r] = Ints{} + load<int32_t>(lower + r * a.depth + k);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const Ints high = load<Ints>(w + n * bytes), low = load<Ints>(w + n * bytes + 4 * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                above[r][n] = dot(above[r][n], u[r], high);
                mixed[r][n][0] = dot(mixed[r][n][0], u[r], low);
                mixed[r][n][apart] = dot(mixed[r][n][apart], l[r], high);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++)
            finish(m, vector + n, a.scales[row + r], above[r][n],
                   apart ? mixed[r][n][0] + mixed[r][n][apart] : mixed[r][n][0], sums + r * stride + n * LANES);
}

#ifdef ELMAN_TILE_PRODUCT
struct Tiles {
    const bool used;

    explicit Tiles(bool wanted) : used(wanted && tiles_allowed()) {
        if (used) TileShapes().load();
    }
    ~Tiles() {
        if (used) _tile_release();
    }
};

// 16 rows at once, or 32; ``rows`` of them count.
template <bool TWO>
void tile_product(const Matrix& m, long vector, const Rows& a, long row, long rows, float* sums, long stride) {
    alignas(64) int32_t products[4][16][LANES];
    const int8_t* w = m.planes + vector * m.depth * 2 * LANES;
    const uint8_t *upper = a.upper + row * a.depth, *lower = a.lower + row * a.depth;
    const long further = 16 * a.depth;
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < m.depth; k += 64, w += 64 * 2 * LANES) {
        _tile_loadd(6, w, 8 * LANES);
        _tile_loadd(4, upper + k, a.depth);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, w + 4 * LANES, 8 * LANES);
        _tile_dpbusd(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, upper + k + further, a.depth);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_loadd(4, lower + k, a.depth);
        _tile_dpbusd(1, 4, 6);
        if (TWO) {
            _tile_loadd(5, lower + k + further, a.depth);
            _tile_dpbusd(3, 5, 6);
        }
    }
    _tile_stored(0, products[0], 4 * LANES);
    _tile_stored(1, products[1], 4 * LANES);
    if (TWO) {
        _tile_stored(2, products[2], 4 * LANES);
        _tile_stored(3, products[3], 4 * LANES);
    }
    for (long i = 0; i < rows; i++) {
        const auto of = [&](long which) { return load<Ints>(products[i / 16 * 2 + which][i % 16]); };
        finish(m, vector, a.scales[row + i], of(0), of(1), sums + i * stride);
    }
}
#else
struct Tiles {
    static constexpr bool used = false;
    explicit Tiles(bool) {}
};
#endif

template <int R>
auto rows_product(long n) {
    return n == 4 ? row_product<R, 4> : n == 3 ? row_product<R, 3> : n == 2 ? row_product<R, 2> : row_product<R, 1>;
}

// sums (rows, stride) += a (rows from ``row`` on) · n vectors of m's rows.
void product(const Tiles& tiles, const Matrix& m, long vector, long n, const Rows& a, long row, long rows,
             float* sums, long stride) {
#ifdef ELMAN_TILE_PRODUCT
    if (tiles.used && rows > MOST_ROWS) {
        const auto tile = rows > 16 ? tile_product<true> : tile_product<false>;
        for (long j = 0; j < n; j++) tile(m, vector + j, a, row, rows, sums + j * LANES, stride);
        return;
    }
#endif
    (void)tiles;
    long i = 0;
    for (; i + PAIR <= rows; i += PAIR) rows_product<PAIR>(n)(m, vector, a, row + i, sums + i * stride, stride);
    for (; i < rows; i++) rows_product<1>(n)(m, vector, a, row + i, sums + i * stride, stride);
}

// Sampler ----------------------------------------------------------------------------------

// One token, as sampling.py draws it: each filter works on what the one before has left.
struct Sampler {
    const Generation& g;
    std::vector<float> p;
    std::vector<int> order;

    explicit Sampler(const Generation& generation) : g(generation), p(padded(g.vocabulary, LANES)) {}

    int64_t draw(long row, double uniform) {
        const long size = g.vocabulary, width = p.size();
        const float* logits = g.logits + row * width;
        uint8_t* seen = g.seen ? g.seen + row * size : nullptr;
        std::copy(logits, logits + width, p.begin());
        for (long i = size; i < width; i++) p[i] = -INFINITY;
        if (seen)
            for (long i = 0; i < size; i++)
                if (seen[i]) p[i] = p[i] > 0 ? p[i] / g.repetition_penalty : p[i] * g.repetition_penalty;
        const int64_t id = g.temperature == 0 ? std::max_element(p.begin(), p.begin() + size) - p.begin() : at(uniform);
        if (seen) seen[id] = 1;
        return id;
    }

    // The token at a quantile of the filtered distribution.
    int64_t at(double uniform) {
        const long size = g.vocabulary, width = p.size();
        Floats most = load<Floats>(p.data());
        for (long i = LANES; i < width; i += LANES) {
            const Floats value = load<Floats>(p.data() + i);
            most = select(value > most, value, most);
        }
        const float highest = largest(most);
        for (long i = 0; i < width; i += LANES) {
            const Floats value = (load<Floats>(p.data() + i) - highest) / g.temperature;
            store(p.data() + i, select(value < -87.0f, Floats{}, exponential(value)));
        }
        if (g.top_p < 1 || (g.top_k > 0 && g.top_k < size)) keep_likeliest();
        // The likeliest is 1.
        const float floor = g.min_p;
        double sum = 0;
        for (long i = 0; i < size; i++) sum += p[i] < floor ? p[i] = 0 : p[i];
        const double quantile = uniform * sum;
        long last = 0;
        sum = 0;
        for (long i = 0; i < size && sum <= quantile; i++)
            if (p[i] > 0) {
                sum += p[i];
                last = i;
            }
        return last;
    }

    void keep_likeliest() {
        const long size = g.vocabulary, most = g.top_k > 0 ? std::min(g.top_k, g.vocabulary) : size;
        double sum = 0;
        for (long i = 0; i < size; i++) sum += p[i];
        // All tokens below this together hold less than top_p leaves: none of them is wanted.
        const double floor = most < size ? 0 : 0.999 * (1 - g.top_p) * sum / size;
        order.clear();
        for (long i = 0; i < size; i++)
            if (p[i] > floor) order.push_back(i);
        const auto likelier = [this](int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
        if (most < (long)order.size()) {
            std::nth_element(order.begin(), order.begin() + most, order.end(), likelier);
            order.resize(most);
            sum = 0;
            for (int i : order) sum += p[i];
        }
        if (g.top_p < 1) {
            std::sort(order.begin(), order.end(), likelier);
            double before = 0;
            size_t kept = 0;
            while (kept < order.size() && (kept == 0 || before < g.top_p * sum)) before += p[order[kept++]];
            order.resize(kept);
        }
        std::sort(order.begin(), order.end());
        auto next = order.begin();
        for (long i = 0; i < size; i++) {
            if (next != order.end() && *next == i) ++next;
            else p[i] = 0;
        }
    }
};

// Threads ----------------------------------------------------------------------------------

// Activations of a layer: h before and after a step, what the textbook's GRU resets, and what goes on.
struct Activations {
    Rows h[2], reset, out;
    float *update, *raw;  // (B, P): z of the textbook's GRU; the output in float32, where it is not h
};

struct Shared {
    const Generation& g;
    const long batch;  // padded to whole tiles
    Barrier barrier;
    Rows input;
    std::vector<Activations> layers;
    std::vector<std::unique_ptr<char, decltype(&std::free)>> memory;

    explicit Shared(const Generation& generation) : g(generation), batch(padded(g.batch, ROWS)) {
        if (g.embedding) input = rows(g.embedding_size);
        for (long i = 0; i < g.num_layers; i++) {
            const long units = padded(g.layers[i].units, LANES);
            layers.push_back({{rows(units), rows(units)}, rows(units), rows(units), floats(units), floats(units)});
            for (long row = 0; row < g.batch; row++)
                for (const Rows& r : {layers[i].h[0], layers[i].h[1], layers[i].reset})
                    r.scales[row] = g.layers[i].bound / LIMIT;
        }
    }
    char* take(size_t size) {
        char* const made = (char*)std::aligned_alloc(64, padded(size, 64));
        if (!made) throw std::bad_alloc();
        memory.emplace_back(made, &std::free);
        std::memset(made, 0, size);
        return made;
    }
    float* floats(long width) { return (float*)take(sizeof(float) * batch * width); }
    Rows rows(long units) {
        const long depth = padded(units, 64);
        Rows made{(uint8_t*)take(batch * depth), (uint8_t*)take(batch * depth), floats(1), depth};
        return made;
    }
};

struct Worker {
    Shared& shared;
    const Generation& g;
    const int team, me;
    const Tiles tiles;
    Sampler sampler;
    alignas(64) float sums[ROWS * WIDEST * LANES];

    explicit Worker(Shared& all)
        : shared(all), g(all.g), team(omp_get_num_threads()), me(omp_get_thread_num()), tiles(g.batch > MOST_ROWS),
          sampler(g) {}

    void wait() {
        if (team > 1) shared.barrier.wait(team);
    }
    long first(long count) const { return count * me / team; }
    long last(long count) const { return count * (me + 1) / team; }

    // Whether a layer's output takes a pass over whole rows.
    static bool passes(const Layer& layer) { return layer.bound == 0 || layer.gain || layer.residual; }
    static bool changes(const Layer& layer) { return layer.gain || layer.residual; }

    void round_state() {
        for (long i = 0; i < g.num_layers; i++)
            for (long row = first(g.batch); row < last(g.batch); row++) {
                const Layer& layer = g.layers[i];
                const long units = padded(layer.units, LANES);
                const Rows& h = shared.layers[i].h[0];
                if (layer.bound == 0) h.put_row(row, layer.h + row * units, units);
                for (long unit = 0; layer.bound != 0 && unit < units; unit += LANES)
                    h.put(row, unit, load<Floats>(layer.h + row * units + unit), LIMIT / layer.bound);
            }
    }

    // One of a layer's products, over the thread's units, and the functions of its sums.
    void run(const Layer& layer, const Activations& act, int s, const Rows* x, const int64_t* tokens, const Rows& h,
             const Rows& after) {
        const Stage& stage = layer.stages[s];
        const long units = padded(layer.units, LANES), vectors = units / LANES;
        const long given = stage.input.gates, skipped = layer.kind == GRU ? 1 : 0;
        const long columns = given + skipped, width = WIDEST / columns, stride = WIDEST * LANES;
        for (long v = first(vectors); v < last(vectors); v += width) {
            const long wide = std::min(width, last(vectors) - v);
            for (long row = 0; row < g.batch; row += ROWS) {
                const long rows = std::min(ROWS, g.batch - row);
                for (long i = 0; i < rows; i++)
                    for (long c = 0; c < wide * columns; c++) {
                        Floats sum = load<Floats>(stage.bias + (v * columns + c) * LANES);
                        if (stage.table && c < wide * given)  // only one is wide where not all are given
                            sum += load<Floats>(stage.table + ((tokens[row + i] * vectors + v) * given + c) * LANES);
                        store(sums + i * stride + c * LANES, sum);
                    }
                if (!stage.table) product(tiles, stage.input, v * given, wide * given, *x, row, rows, sums, stride);
                if (stage.recurrent.depth)
                    product(tiles, stage.recurrent, v * given, wide * given, h, row, rows, sums + skipped * LANES,
                            stride);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < wide; j++)
                        activate(layer, act, s, row + i, (v + j) * LANES, sums + i * stride + j * columns * LANES,
                                 after);
            }
        }
    }

    void activate(const Layer& layer, const Activations& act, int s, long row, long unit, const float* from,
                  const Rows& after) {
        const long at = row * padded(layer.units, LANES) + unit;
        const auto sum = [from](long column) { return load<Floats>(from + column * LANES); };
        Floats h = load<Floats>(layer.h + at);
        switch (layer.kind) {
            case RNN_TANH:
                h = tangent(sum(0));
                break;
            case RNN_RELU:
                h = select(sum(0) < 0.0f, Floats{}, sum(0));
                break;
            case LSTM: {
                const Floats c = sigmoid(sum(1)) * load<Floats>(layer.c + at) + sigmoid(sum(0)) * tangent(sum(2));
                store(layer.c + at, c);
                h = sigmoid(sum(3)) * tangent(c);
                break;
            }
            case GRU: {
                const Floats n = tangent(sum(0) + sigmoid(sum(1)) * sum(3));
                h = n + sigmoid(sum(2)) * (h - n);
                break;
            }
            case MINGRU: {
                const Floats z = sigmoid(sum(0));
                h = h + z * (positive(sum(1)) - h);
                break;
            }
            case MINLSTM: {  // f / (f + i), of which 0 / 0 never comes
                const Floats f = 1.0f + exponential(-sum(0)), i = 1.0f + exponential(-sum(1));
                h = h + f * reciprocal(f + i) * (positive(sum(2)) - h);
                break;
            }
            default:
                if (s == 0) {
                    act.reset.put(row, unit, sigmoid(sum(0)) * h, LIMIT / layer.bound);
                    store(act.update + at, sigmoid(sum(1)));
                    return;
                }
                h = h + load<Floats>(act.update + at) * (tangent(sum(0)) - h);
        }
        for (long lane = layer.units - unit; lane < LANES; lane++) h[lane] = 0;  // padding's sums need not make it 0
        store(layer.h + at, h);
        if (layer.bound != 0) after.put(row, unit, h, LIMIT / layer.bound);
    }

    // Normalisation, the residual connection, and rounding that waits for a row's largest.
    void pass(long index, const int64_t* tokens, const Rows& after) {
        const Layer& layer = g.layers[index];
        const Activations& act = shared.layers[index];
        const long units = padded(layer.units, LANES);
        for (long row = first(g.batch); row < last(g.batch); row++) {
            const float* h = layer.h + row * units;
            if (layer.bound == 0) after.put_row(row, h, units);
            if (!changes(layer)) continue;
            float *to = act.raw + row * units, mean = 0, inverse = 1;
            if (layer.gain) {
                Floats sum{}, squares{};
                for (long i = 0; i < units; i += LANES) sum += load<Floats>(h + i);
                mean = total(sum) / layer.units;
                for (long i = 0; i < units; i += LANES) {
                    const Floats off = load<Floats>(h + i) - mean;
                    squares += off * off;
                }
                const float padding = (units - layer.units) * mean * mean;
                inverse = 1 / std::sqrt((total(squares) - padding) / layer.units + layer.epsilon);
            }
            const float* before = index == 0 ? g.embedding + tokens[row] * units : raw(index - 1) + row * units;
            for (long i = 0; i < units; i += LANES) {
                Floats value = load<Floats>(h + i);
                if (layer.gain)
                    value = (value - mean) * inverse * load<Floats>(layer.gain + i) + load<Floats>(layer.shift + i);
                if (layer.residual) value += load<Floats>(before + i);
                store(to + i, value);
            }
            act.out.put_row(row, to, units);
        }
    }
    const float* raw(long index) const {
        return changes(g.layers[index]) ? shared.layers[index].raw : g.layers[index].h;
    }

    void score(const Rows& x) {
        const long width = padded(g.vocabulary, LANES), vectors = width / LANES, stride = WIDEST * LANES;
        for (long v = first(vectors); v < last(vectors); v += WIDEST) {
            const long wide = std::min(WIDEST, last(vectors) - v);
            for (long row = 0; row < g.batch; row += ROWS) {
                const long rows = std::min(ROWS, g.batch - row);
                for (long i = 0; i < rows; i++)
                    std::memcpy(sums + i * stride, g.output_bias + v * LANES, sizeof(float) * wide * LANES);
                product(tiles, g.output, v, wide, x, row, rows, sums, stride);
                for (long i = 0; i < rows; i++)
                    std::memcpy(g.logits + (row + i) * width + v * LANES, sums + i * stride,
                                sizeof(float) * wide * LANES);
            }
        }
    }

    void step(long t) {
        int64_t* tokens = g.ids + t * g.batch;
        for (long row = first(g.batch); row < last(g.batch); row++) {
            tokens[row] = sampler.draw(row, g.uniforms[t * g.batch + row]);
            if (g.embedding)
                shared.input.put_row(row, g.embedding + tokens[row] * g.embedding_size, g.embedding_size);
        }
        wait();
        const Rows* x = &shared.input;
        for (long i = 0; i < g.num_layers; i++) {
            const Layer& layer = g.layers[i];
            const Activations& act = shared.layers[i];
            const Rows &before = act.h[t % 2], &after = act.h[(t + 1) % 2];
            run(layer, act, 0, x, tokens, before, after);
            wait();
            if (layer.kind == GRU_RESET_BEFORE) {
                run(layer, act, 1, x, tokens, act.reset, after);
                wait();
            }
            if (passes(layer)) {
                pass(i, tokens, after);
                wait();
            }
            x = changes(layer) ? &act.out : &after;
        }
        score(*x);
        wait();
    }
};

}  // namespace

extern "C" {

// Round a weight (gates × units, inputs) to 16 bits. ``order`` tells which of torch's gates is which of the matrix.
void elman_pack(const float* weight, int64_t units, int64_t inputs, const int64_t* order, const Matrix* matrix) {
    const Matrix& m = *matrix;
    const long vectors = padded(units, LANES) / LANES * m.gates, bytes = m.depth * 2 * LANES;
    for (long v = 0; v < vectors; v++) {
        int8_t* const planes = m.planes + v * bytes;
        std::memset(planes, 0, bytes);
        for (long lane = 0; lane < LANES; lane++) {
            const long unit = v / m.gates * LANES + lane;
            int32_t upper_sum = 0, lower_sum = 0;
            float bound = 0;
            const float* row = weight + (order[v % m.gates] * units + unit) * inputs;
            const long count = unit < units ? inputs : 0;
            for (long k = 0; k < count; k++) bound = std::max(bound, std::fabs(row[k]));
            const float inverse = bound > 0 ? LIMIT / bound : 0;
            for (long k = 0; k < count; k++) {
                const int32_t whole = (int32_t)std::nearbyint(row[k] * inverse), upper = (whole + 128) >> 8;
                const int32_t lower = whole - upper * 256;
                int8_t* const to = planes + k / 4 * 8 * LANES + lane * 4 + k % 4;
                to[0] = upper;
                to[4 * LANES] = lower;
                upper_sum += upper;
                lower_sum += lower;
            }
            m.scales[v * LANES + lane] = bound / LIMIT;
            int32_t* const offsets = m.offsets + v * 2 * LANES + lane;
            offsets[0] = -128 * upper_sum;
            offsets[LANES] = -128 * (upper_sum + lower_sum);
        }
    }
}

void elman_generate(const Generation* generation) {
    Shared shared(*generation);
#pragma omp parallel num_threads(generation->threads)
    {
        Worker worker(shared);
        worker.round_state();
        worker.wait();
        for (long t = 0; t < generation->steps; t++) worker.step(t);
    }
}

}
