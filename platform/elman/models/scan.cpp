// Minimal gated recurrences over a whole window, forward and backward.
//
// Given the gates, a step is a few functions of every element, and no unit needs another: time goes
// in order, and what is parallel are the units, in vectors and over threads. The gates are read once,
// and little else is done but to read them; backward computes their functions again, which costs
// less than to have written them down.
//
// Arrays are batch-first: gates (B, T, gates × H) or with tokens a table (V, gates × H), outputs
// (B, T, H). In memory values are float or bfloat16, arithmetic is in float. A thread owns some of
// the units for the whole batch: sums over batch and time are its own, and no result depends on
// the number of threads.
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// Sixteen lanes, of which the last vector of a row may hold fewer ---------------------------------

typedef uint16_t Bf16;

template <class Vector, class Value>
inline Vector copy_in(const Value* from, long count) {
    Vector value = {};
    if (count == LANES) std::memcpy(&value, from, sizeof value);  // of constant size: one instruction
    else std::memcpy(&value, from, count * sizeof(Value));
    return value;
}
template <class Value, class Vector>
inline void copy_out(Value* to, Vector value, long count) {
    if (count == LANES) std::memcpy(to, &value, sizeof value);
    else std::memcpy(to, &value, count * sizeof(Value));
}

inline Floats load(const float* from, long count) { return copy_in<Floats>(from, count); }
inline Floats load(const Bf16* from, long count) {
    return (Floats)(__builtin_convertvector(copy_in<Halves>(from, count), Words) << 16);
}
inline void store(float* to, Floats value, long count) { copy_out(to, value, count); }
inline void store(Bf16* to, Floats value, long count) {  // to the nearest, between two to the even one
    const Words bits = (Words)value, is_number = (Words)(value == value);
    const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    copy_out(to, __builtin_convertvector((nearest & is_number) | (0x7fc0 & ~is_number), Halves), count);
}

// exp(x) to 2e-7, with x held within ± 80 so that sums of it stay finite; NaN stays. x = n ln 2 + r,
// and Taylor's polynomial in r, |r| ≤ ln 2 / 2.
inline Floats exponential(Floats x) {
    const Floats bound = 80.0f - Floats{};
    x = select(x > bound, bound, x);
    x = select(x < -bound, -bound, x);
    const Floats shifted = x * 1.44269504f + 0x1.8p23f;  // n is in its lowest bits
    const Floats n = shifted - 0x1.8p23f;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Floats)(((Words)shifted + 127) << 23);
}

// g of cells.py, and its slope.
struct Positive {
    Floats value, slope;

    explicit Positive(Floats x) {
        const Floats e = exponential(-x), sigmoid = 1.0f / (1.0f + e);
        value = select(x >= 0.0f, x + 0.5f, sigmoid);
        slope = select(x >= 0.0f, 1.0f - Floats{}, e * sigmoid * sigmoid);
    }
};

// The cells of cells.py. ``back`` takes the gradient of the new state, gives those of the gates, and
// returns that of the state before. -----------------------------------------------------------------

struct MinGru {
    static constexpr long GATES = 2;  // z h̃

    static Floats step(const Floats* gates, Floats h) {
        return h + (Positive(gates[1]).value - h) / (1.0f + exponential(-gates[0]));
    }
    static Floats back(const Floats* gates, Floats before, Floats d_h, Floats* d_gates) {
        const Floats e = exponential(-gates[0]), z = 1.0f / (1.0f + e), keep = e * z;
        const Positive candidate(gates[1]);
        d_gates[0] = d_h * (candidate.value - before) * z * keep;
        d_gates[1] = d_h * z * candidate.slope;
        return d_h * keep;
    }
};

struct MinLstm {
    static constexpr long GATES = 3;  // f i h̃; over σ(x) = 1 / (1 + e⁻ˣ), so that 0 is not divided by 0

    static Floats step(const Floats* gates, Floats h) {
        const Floats f = exponential(-gates[0]), i = exponential(-gates[1]);
        return h + (Positive(gates[2]).value - h) * ((1.0f + f) / (2.0f + f + i));
    }
    static Floats back(const Floats* gates, Floats before, Floats d_h, Floats* d_gates) {
        const Floats f = exponential(-gates[0]), i = exponential(-gates[1]), both = 1.0f / (2.0f + f + i);
        const Floats keep = (1.0f + i) * both, add = (1.0f + f) * both;
        const Positive candidate(gates[2]);
        const Floats d_ratio = d_h * (before - candidate.value) * keep * add;  // of log f − log i
        d_gates[0] = d_ratio * (f / (1.0f + f));
        d_gates[1] = -d_ratio * (i / (1.0f + i));
        d_gates[2] = d_h * add * candidate.slope;
        return d_h * keep;
    }
};

// Over a window -------------------------------------------------------------------------------------

struct Window {
    int64_t threads, batch, steps, hidden, is_bf16;
    const int64_t* tokens;  // (B, T), or null
    const uint8_t* resets;  // (B, T), or null: where start is put in the state's place before the step
    const float* start;     // (H)
    const void* gates;      // without their biases
    const float* bias;      // (gates × H)
    float* h;               // (B, H): the state, which the last one replaces; backward its gradient
    const float* before;    // (B, H): backward, the state before the window
    void* outputs;          // (B, T, H)
    const void* d_outputs;  // (B, T, H)
    void* d_gates;          // as gates; of a table in float, and added to
    float* d_bias;          // added to
    float* d_start;         // added to
};

// Calls work(first, end) for the units of every thread.
template <class Work>
void share(const Window& w, Work work) {
    const long vectors = (w.hidden + LANES - 1) / LANES, threads = w.threads < vectors ? w.threads : vectors;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long thread = 0; thread < threads; thread++) {
        const long first = vectors * thread / threads * LANES, end = vectors * (thread + 1) / threads * LANES;
        work(first, end < w.hidden ? end : w.hidden);
    }
}

template <class Sweep>
inline void sweep(long first, long end, Sweep unit_by_unit) {
    for (; first + LANES <= end; first += LANES) unit_by_unit(first, LANES);
    if (first < end) unit_by_unit(first, end - first);
}

template <class Cell, class Value>
inline void load_gates(const Window& w, const Value* x, long unit, long count, Floats* gates) {
    for (long k = 0; k < Cell::GATES; k++)
        gates[k] = load(x + k * w.hidden + unit, count) + load(w.bias + k * w.hidden + unit, count);
}

template <class Cell, class Value>
void forward(const Window& w) {
    share(w, [&](long first, long end) {
        for (long row = 0; row < w.batch; row++) {
            float* h = w.h + row * w.hidden;
            for (long at = row * w.steps; at < (row + 1) * w.steps; at++) {
                const Value* x = (const Value*)w.gates + (w.tokens ? w.tokens[at] : at) * Cell::GATES * w.hidden;
                Value* out = (Value*)w.outputs + at * w.hidden;
                if (w.resets && w.resets[at]) std::memcpy(h + first, w.start + first, sizeof(float) * (end - first));
                sweep(first, end, [&](long unit, long count) {
                    Floats gates[Cell::GATES];
                    load_gates<Cell>(w, x, unit, count, gates);
                    const Floats after = Cell::step(gates, load(h + unit, count));
                    store(h + unit, after, count);
                    store(out + unit, after, count);
                });
            }
        }
    });
}

template <class Cell, class Value, bool TABLE>
void backward(const Window& w) {
    share(w, [&](long first, long end) {
        for (long row = 0; row < w.batch; row++) {
            float* d_h = w.h + row * w.hidden;
            for (long at = (row + 1) * w.steps - 1; at >= row * w.steps; at--) {
                const long source = (TABLE ? w.tokens[at] : at) * Cell::GATES * w.hidden;
                const bool is_reset = w.resets && w.resets[at];
                // The state that was given before the step; else it is what the step before put out.
                const float* given = is_reset ? w.start : at == row * w.steps ? w.before + row * w.hidden : nullptr;
                sweep(first, end, [&](long unit, long count) {
                    Floats gates[Cell::GATES], d_gates[Cell::GATES];
                    load_gates<Cell>(w, (const Value*)w.gates + source, unit, count, gates);
                    const Floats before = given ? load(given + unit, count)
                                                : load((const Value*)w.outputs + (at - 1) * w.hidden + unit, count);
                    const Floats d_out = load((const Value*)w.d_outputs + at * w.hidden + unit, count);
                    store(d_h + unit, Cell::back(gates, before, load(d_h + unit, count) + d_out, d_gates), count);
                    for (long k = 0; k < Cell::GATES; k++) {
                        const long column = k * w.hidden + unit;
                        store(w.d_bias + column, load(w.d_bias + column, count) + d_gates[k], count);
                        if (TABLE) {
                            float* sum = (float*)w.d_gates + source + column;
                            store(sum, load(sum, count) + d_gates[k], count);
                        } else {
                            store((Value*)w.d_gates + source + column, d_gates[k], count);
                        }
                    }
                });
                if (is_reset)
                    for (long unit = first; unit < end; unit++) {
                        w.d_start[unit] += d_h[unit];
                        d_h[unit] = 0;
                    }
            }
        }
    });
}

template <class Cell, class Value>
void run(const Window& w, bool is_forward) {
    if (is_forward) forward<Cell, Value>(w);
    else (w.tokens ? backward<Cell, Value, true> : backward<Cell, Value, false>)(w);
}

template <class Cell>
void run(const Window& w, bool is_forward) {
    (w.is_bf16 ? run<Cell, Bf16> : run<Cell, float>)(w, is_forward);
}

}  // namespace

extern "C" {

void elman_mingru(const Window* w, int is_forward) { run<MinGru>(*w, is_forward); }
void elman_minlstm(const Window* w, int is_forward) { run<MinLstm>(*w, is_forward); }

}
