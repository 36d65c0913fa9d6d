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
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "products.h"
#include "threads.h"

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
    Bits* before;            // (T, B, P) bfloat16: h before every step; with resets memory of its own, else in outputs
    const uint8_t* resets;   // (T, B), or null: where start is put in the state's place before the step
    const float* start_h;    // (P)
    const float* start_c;
    Bits* saved;             // (T, B, columns P) half: what backward needs
    Bits* reset;             // (T, B, P) bfloat16: r ⊙ h, where it is what is multiplied
    // Backward only.
    Bits* gates;             // (T, B, columns P) bfloat16: gradients of the gates; may be saved itself
    const Bits* d_outputs;   // (T, B, P) bfloat16, or null
    float* d_h;              // (B, P): in the gradient of the last state, out of the first
    float* d_c;
    float* d_start_h;        // (P), with resets
    float* d_start_c;
    float* d_table;          // (V, gates P), with tokens
    float* d_bias;           // (columns P)
    int64_t wants_d_h;       // whether the gradient of the first state, or of start, is wanted
};

// A sum of outer products over all steps and rows of the batch, as Python describes it.
struct Outer {
    int64_t threads, count, units, hidden, gates;
    const Bits* left;        // (N, left_stride), of which gates P columns count
    int64_t left_stride;
    const Bits* right;       // (N, P)
    Bits* packed;            // (N padded to a multiple of 32, P): memory
    float* sums;             // (gates H, H)
};

namespace {

thread_local Scratch scratch;

constexpr long ROWS = 96;  // at a time: their sums fit into L1 beside the weights that pass through

inline long padded(const Window& w) { return (w.hidden + LANES - 1) / LANES * LANES; }

// Whether the state is reset before the step, ``at`` being step × batch + row.
inline bool is_reset(const Window& w, long at) { return w.resets && w.resets[at]; }

// What is carried into a step in single precision.
inline const float* h_before(const Window& w, long at, long units, long row, long unit) {
    return is_reset(w, at) ? w.start_h + unit : w.h + row * units + unit;
}

inline const float* c_before(const Window& w, long at, long units, long row, long unit) {
    return is_reset(w, at) ? w.start_c + unit : w.c + (w.saved ? at : row) * units + unit;
}

// h of a step, rounded: for the layer above, and for the next step.
inline void put(const Window& w, long at, long units, long unit, Floats h) {
    const long next = w.batch + at;
    to_bf16(w.outputs + next * units + unit, h);
    if (w.resets && next < w.steps * w.batch)
        to_bf16(w.before + next * units + unit, w.resets[next] ? load<Floats>(w.start_h + unit) : h);
}

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
                for (long k = 0; k < units; k += 2 * LANES) {
                    Words rows[LANES];
                    for (long lane = 0; lane < LANES; lane++) {
                        const long gate = first_gate + j % gates, unit = begin(p) + j / gates * LANES + lane;
                        Bits row[2 * LANES];
                        to_bf16(row, weights_at(gate, unit, k));
                        to_bf16(row + LANES, weights_at(gate, unit, k + LANES));
                        rows[lane] = load<Words>(row);
                    }
                    transpose(rows);
                    for (long pair = 0; pair < std::min(LANES, (units - k) / 2); pair++)
                        store(to + ((k / 2 + pair) * n + j) * 2 * LANES, rows[pair]);
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
                    const long gate = first_gate + k / units, unit = k % units, column = begin(p) + v * LANES;
                    store(to, paired(weights_at(gate, unit, column), weights_at(gate, unit + 1, column)));
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
                    const long unit = begin(p) + v * LANES;
                    to_bf16(w.before + row * units + unit, load<Floats>(h_before(w, row, units, row, unit)));
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
        put(w, at, units, unit, h);
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
        float* after = w.c + (w.saved ? w.batch + at : row) * units + unit;
        const Floats c = f * load<Floats>(c_before(w, at, units, row, unit)) + i * g;
        const Floats h = o * tangent(c);
        store(after, c);
        put(w, at, units, unit, h);
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
        d[1] = dc * load<Floats>(c_before(w, at, units, row, unit)) * f * (1.0f - f);
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
        const Floats h = n + z * (load<Floats>(h_before(w, at, units, row, unit)) - n);
        store(w.h + row * units + unit, h);
        put(w, at, units, unit, h);
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
        const Floats before = from_bf16(w.before + at * units + unit);
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
                gates, w.before + t * w.batch * units, units, worker.weights, units / 2,
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

inline void add(float* sum, Floats d) { store(sum, load<Floats>(sum) + d); }

// The gradients of one vector of units at one step: rounded, and summed into the biases' and the table's.
template <long COLUMNS, long GATES, bool TABLE>
inline void keep(const Window& w, long at, long units, long unit, long column, Floats d, Floats& d_bias) {
    to_bf16(w.gates + (at * COLUMNS + column) * units + unit, d);
    d_bias += d;
    if (TABLE && column < GATES) add(w.d_table + (w.tokens[at] * GATES + column) * units + unit, d);
}

// Whether the next step does not see the state after step t.
inline bool is_cut(const Window& w, long t, long row) {
    return t < w.steps - 1 && is_reset(w, (t + 1) * w.batch + row);
}

inline Floats d_output(const Window& w, long t, long units, long row, long unit) {
    return t >= 0 && w.d_outputs ? from_bf16(w.d_outputs + (t * w.batch + row) * units + unit) : Floats{};
}

// What the recurrent product is added to, for the gradient of h after step t, or of the start that followed it.
inline Floats d_h_at(const Window& w, long t, long units, long row, long unit, bool carries) {
    Floats sum{};
    if (carries || t == w.steps - 1) sum = load<Floats>(w.d_h + row * units + unit);
    return is_cut(w, t, row) ? sum : sum + d_output(w, t, units, row, unit);
}

// The gradient of h after step t, of what d_h_at and the product came to.
inline Floats d_h_after(const Window& w, long t, long units, long row, long unit, const float* s) {
    const Floats sum = load<Floats>(s);
    if (!is_cut(w, t, row)) return sum;
    add(w.d_start_h + unit, sum);
    if (w.d_c) {
        float* carried = w.d_c + row * units + unit;
        add(w.d_start_c + unit, load<Floats>(carried));
        store(carried, Floats{});
    }
    return d_output(w, t, units, row, unit);
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
                        for (; row < end; row++, s += stride)
                            store(w.d_h + row * units + unit, d_h_after(w, t, units, row, unit, s));
                        return;
                    }
                    Floats d[columns], d_bias[columns];
                    for (long g = 0; g < columns; g++) d_bias[g] = load<Floats>(w.d_bias + g * units + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = t * w.batch + row;
                        Cell::backward(w, at, units, row, unit, d_h_after(w, t, units, row, unit, s), d);
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
                2, w.before + begin * units, units, worker.weights, units / 2,
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
                        const Floats before = load<Floats>(h_before(w, begin + row, units, row, unit));
                        to_bf16(reset + row * units + unit, r * before);
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
                        const Floats before = load<Floats>(h_before(w, begin + row, units, row, unit));
                        const Floats h = before + z * (n - before);
                        store(w.h + row * units + unit, h);
                        put(w, begin + row, units, unit, h);
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
                        for (; row < end; row++, s += stride)
                            store(w.d_h + row * units + unit, d_h_after(w, t, units, row, unit, s));
                        return;
                    }
                    Floats d_bias_z = load<Floats>(w.d_bias + units + unit);
                    Floats d_bias_n = load<Floats>(w.d_bias + 2 * units + unit);
                    for (; row < end; row++, s += stride) {
                        const long at = begin + row;
                        const Bits* saved = w.saved + at * width + unit;
                        const Floats z = from_half(saved + units), n = from_half(saved + 2 * units);
                        const Floats before = from_bf16(w.before + at * units + unit);
                        const Floats dh = d_h_after(w, t, units, row, unit, s);
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
                        const Floats before = from_bf16(w.before + at * units + unit);
                        keep<3, 3, TABLE>(w, at, units, unit, 0, d_reset * before * r * (1.0f - r), d_bias);
                        add(w.d_h + row * units + unit, d_reset * r);
                    }
                    store(w.d_bias + unit, d_bias);
                });
            worker.wait();
        }
    }
}

// The gradient of weight_hh ---------------------------------------------------------------

constexpr long DEEP = 512;  // steps × rows at a time
constexpr long TALL = 256;  // gates at a time: their sums, and what they are sums of, fit into L2

inline Floats row_at(const Outer& o, const Bits* matrix, long stride, long n, long column) {
    return n < o.count ? from_bf16(matrix + n * stride + column) : Floats{};
}

// sums = leftᵀ · right. The left factor is transposed by pairs of rows as they are needed; the right
// one lies in pairs before the products begin: per panel of 64 columns (pairs of rows, columns, 2).
void sum_outer_products(const Outer& o, Barrier& barrier) {
    const long team = omp_get_num_threads(), me = omp_get_thread_num();
    const long units = o.units, rows = o.gates * units, padded_count = (o.count + 31) / 32 * 32;
    const long panels = (units + 63) / 64;
    const auto width = [&](long panel) { return std::min(4L, (units - 64 * panel) / LANES); };
    for (long k = padded_count / 2 * me / team; k < padded_count / 2 * (me + 1) / team; k++)
        for (long panel = 0; panel < panels; panel++)
            for (long v = 0; v < width(panel); v++) {
                const long column = 64 * panel + v * LANES;
                Bits* const to = o.packed + 64 * panel * padded_count + (k * width(panel) + v) * 2 * LANES;
                store(to, paired(row_at(o, o.right, units, 2 * k, column), row_at(o, o.right, units, 2 * k + 1, column)));
            }
    barrier.wait(team);
    const long blocks = rows / LANES;
    const long first = blocks * me / team * LANES, last = blocks * (me + 1) / team * LANES;
    Bits* const a = (Bits*)scratch.take(sizeof(Bits) * TALL * DEEP + sizeof(float) * TALL * units);
    float* const c = (float*)(a + TALL * DEEP);
    for (long begin = first; begin < last; begin += TALL) {
        const long tall = std::min(TALL, last - begin);
        std::memset(c, 0, sizeof(float) * tall * units);
        for (long n = 0; n < padded_count; n += DEEP) {
            const long deep = std::min(DEEP, padded_count - n);
            for (long k = 0; k < deep; k += 2 * LANES)
                for (long gate = 0; gate < tall; gate += LANES) {
                    Words block[LANES];
                    for (long i = 0; i < LANES; i++) {
                        const long at = n + k + 2 * i;
                        block[i] = paired(
                            row_at(o, o.left, o.left_stride, at, begin + gate),
                            row_at(o, o.left, o.left_stride, at + 1, begin + gate));
                    }
                    transpose(block);
                    for (long i = 0; i < LANES; i++) store(a + (gate + i) * DEEP + k, block[i]);
                }
            for (long panel = 0; panel < panels; panel++)
                tile_product(
                    width(panel), a, DEEP, o.packed + 64 * panel * padded_count + n * width(panel) * LANES, deep / 2,
                    c + 64 * panel * tall, tall);
        }
        for (long row = begin; row < begin + tall; row++) {
            const long gate = row / units, unit = row % units;
            if (unit >= o.hidden) continue;
            for (long panel = 0; panel < panels; panel++) {
                const long stride = width(panel) * LANES, wanted = std::min(stride, o.hidden - 64 * panel);
                if (wanted <= 0) continue;
                std::memcpy(
                    o.sums + (gate * o.hidden + unit) * o.hidden + 64 * panel,
                    c + 64 * panel * tall + (row - begin) * stride, sizeof(float) * wanted);
            }
        }
    }
    release_tiles();
}

template <class Cell>
void run(const Window& w, bool is_forward) {
    if (is_forward) (w.tokens ? forward<Cell, true> : forward<Cell, false>)(w);
    else (w.tokens ? backward<Cell, true> : backward<Cell, false>)(w);
}

}  // namespace

extern "C" {

int elman_has_tiles() { return has_tile_product(); }

void elman_outer(const Outer* outer) {
    Barrier barrier;
#pragma omp parallel num_threads(outer->threads)
    sum_outer_products(*outer, barrier);
}

void elman_rnn_tanh(const Window* w, int is_forward) { run<Rnn<false>>(*w, is_forward); }
void elman_rnn_relu(const Window* w, int is_forward) { run<Rnn<true>>(*w, is_forward); }
void elman_lstm(const Window* w, int is_forward) { run<Lstm>(*w, is_forward); }
void elman_gru(const Window* w, int is_forward) { run<Gru>(*w, is_forward); }

void elman_gru_reset_before(const Window* w, int is_forward) {
    if (is_forward) (w->tokens ? forward_reset_before<true> : forward_reset_before<false>)(*w);
    else (w->tokens ? backward_reset_before<true> : backward_reset_before<false>)(*w);
}

}
