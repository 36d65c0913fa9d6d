// Cross-entropy of a linear layer, forward and backward, in bfloat16 products with sums in float32.
//
// What threads add up depends on their number, and on nothing else.
//
// A large vocabulary, whose text may come in parts, a call forward and one backward for each: the scores are
// computed transposed, a token of the vocabulary in a row and the positions of the text in its columns: so
// the weights are the left factor as they lie in memory, and the sums of exponentials run down the columns.
// A block of rows at a time passes through the cache: multiplied, summed, and its exponentials kept where
// backward will want them, relative to the largest score that was known by then. Backward turns a block of
// them into the scores' gradients, and multiplies those with the features for the weights' gradient, which
// is written once, in float32; and with the weights for the features' gradient, of which each thread has a
// sum of its own. Positions are padded to a multiple of 16 and lie in panels of at most 64, H to a multiple
// of 32, and V, where it is summed over, to a multiple of 32, with zeros.
//
// A small vocabulary, whose weights stay in the cache: each thread has positions of its own, and does all
// that there is to do with some of them, the gradients too, before it goes on to the next.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#include "products.h"
#include "threads.h"

// A call for a large vocabulary, as Python describes it. Pointers that a call does not need are null.
struct Loss {
    int64_t threads, positions, hidden, vocabulary, stride, tiles;
    int64_t adds;            // backward: to d_weight and d_bias, which other positions have begun
    const float* weight;     // (V, H)
    const float* bias;       // (V)
    const Bits* features;    // (N, stride), of which H columns count
    const int64_t* targets;  // (N)
    Bits* packed;            // N × H, padded: the features as the right factor
    Bits* kept;              // V × N, padded: panels of the scores' exponentials
    float* tops;             // (blocks of ROWS of V, N): what the exponentials are relative to; with kept
    float* sums;             // (threads, 3, N): the largest scores, sums of exponentials, and whose the largest are
    int64_t* predicted;      // (N): tokens of the largest scores, or null
    float* lse;              // (N): logarithms of the sums of exponentials
    float* found;            // (N): the targets' scores
    // Backward only.
    const float* factors;    // (N): of the gradients, zero for padding and for targets that do not count
    float* d_weight;         // (V, H)
    float* d_bias;           // (V)
    Bits* d_features;        // (N, H)
    float* gathered;         // (threads, H × N, padded): panels of the transpose of the threads' parts
};

// The same for a small one.
struct SmallLoss {
    int64_t threads, positions, hidden, vocabulary, stride, tiles;
    const float* weight;     // (V, H)
    const float* bias;       // (V)
    const Bits* features;    // (N, stride), of which H columns count
    const int64_t* targets;  // (N); negative ones do not count
    int64_t* predicted;      // (N): tokens of the largest scores, or null
    float* losses;           // (N): zero for targets that do not count
    Bits* left;              // V × H, padded: the weights as the left factor
    // With gradients only.
    const float* factor;     // of every gradient
    Bits* right;             // V × H, padded: the weights as the right factor
    float* sums;             // (threads, V, H padded + LANES): the threads' parts of the weights' and biases' gradients
    float* d_weight;         // (V, H)
    float* d_bias;           // (V)
    Bits* d_features;        // (N, H)
};

namespace {

thread_local Scratch scratch;

constexpr long PANEL = 4 * LANES;  // positions or hidden units whose sums are computed together, at most

inline long up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }
inline long width(long begin, long end) { return std::min(PANEL, up(end - begin, LANES)) / LANES; }  // in vectors

// Pairs of hidden units that are multiplied: whole tiles of them, or as many as there are.
template <class Call>
inline long unit_pairs(const Call& l) { return l.tiles ? up(l.hidden, 2 * LANES) / 2 : (l.hidden + 1) / 2; }

template <class Call>
inline void multiply(
    const Call& l, long n, const Bits* a, long a_stride, const Bits* w, long pairs, float* c, long rows) {
    (l.tiles ? tile_product : vector_product)(n, a, a_stride, w, pairs, c, rows);
}

// A thread's part of so many things, which begin at multiples of ``unit``.
struct Part {
    long begin, end;
    Part(long count, long unit) {
        const long units = (count + unit - 1) / unit, team = omp_get_num_threads(), me = omp_get_thread_num();
        begin = units * me / team * unit;
        end = std::min(units * (me + 1) / team * unit, count);
    }
};

// Sixteen weights of a row, zeros beyond the real ones.
template <class Call>
inline Floats weights_at(const Call& l, long row, long column) {
    Floats values{};
    if (row >= l.vocabulary || column >= l.hidden) return values;
    const float* from = l.weight + row * l.hidden + column;
    if (column + LANES <= l.hidden) return load<Floats>(from);
    std::memcpy(&values, from, sizeof(float) * (l.hidden - column));
    return values;
}

// As many values of a position's features as ``Vector`` holds, zeros beyond the real ones.
template <class Vector, class Call>
inline Vector features_at(const Call& l, long position, long unit) {
    const long count = sizeof(Vector) / sizeof(Bits);
    const Bits* const from = l.features + position * l.stride + unit;
    Vector values{};
    if (position >= l.positions || unit >= l.hidden) return values;
    if (unit + count <= l.hidden) return load<Vector>(from);
    std::memcpy(&values, from, sizeof(Bits) * (l.hidden - unit));
    return values;
}

// Values of two rows side by side.
inline Words interleaved(Halves first, Halves second) {
    return __builtin_convertvector(first, Words) | __builtin_convertvector(second, Words) << 16;
}

// ``n`` vectors of positions, as the right factor of what is summed over hidden units: (pairs of these, positions, 2).
template <class Call>
void pack_by_position(const Call& l, long first, long n, Bits* to) {
    for (long unit = 0; unit < l.hidden; unit += 2 * LANES)
        for (long j = 0; j < n; j++) {
            Words block[LANES];
            for (long i = 0; i < LANES; i++) block[i] = features_at<Words>(l, first + j * LANES + i, unit);
            transpose(block);
            for (long i = 0; i < LANES; i++) store(to + ((unit / 2 + i) * n + j) * 2 * LANES, block[i]);
        }
}

// ``n`` vectors of hidden units, as the right factor of what is summed over positions: (pairs of these, units, 2).
template <class Call>
void pack_by_unit(const Call& l, long first, long count, long unit, long n, Bits* to) {
    for (long k = first; k < first + count; k += 2)
        for (long j = 0; j < n; j++, to += 2 * LANES) {
            const Halves even = features_at<Halves>(l, k, unit + j * LANES);
            store(to, interleaved(even, features_at<Halves>(l, k + 1, unit + j * LANES)));
        }
}

// The first ``count`` of sixteen values, or all.
inline void store_bf16(Bits* to, Floats values, long count) {
    if (count >= LANES) return to_bf16(to, values);
    Bits sixteen[LANES];
    to_bf16(sixteen, values);
    std::memcpy(to, sixteen, sizeof(Bits) * count);
}

// One value.
inline Bits bf16_of(float value) {
    Bits sixteen[LANES];
    to_bf16(sixteen, splat(value));
    return sixteen[0];
}

// Large vocabularies -----------------------------------------------------------------------

constexpr long ROWS = 96;  // of the vocabulary at a time

struct Sizes {
    const Loss& l;
    long n, h, v;   // padded
    long vectors;   // of positions
    long panels;    // of positions, of nearly equal widths

    explicit Sizes(const Loss& loss) : l(loss) {
        n = up(l.positions, LANES);
        h = up(l.hidden, 2 * LANES);
        v = up(l.vocabulary, 2 * LANES);
        vectors = n / LANES;
        panels = up(n, PANEL) / PANEL;
    }
    long first(long panel) const { return vectors * panel / panels; }
    long width(long panel) const { return first(panel + 1) - first(panel); }  // in vectors
    Bits* kept(long panel) const { return l.kept + first(panel) * LANES * v; }
};

// One vector of positions: adds the rows' exponentials to the sums so far, and keeps them.
void add_exponentials(
    const float* c, long stride, long begin, long rows, float* largest, float* sum, int32_t* whose, Bits* kept) {
    Floats before = load<Floats>(largest), top = before;
    if (whose) {
        Ints tokens = load<Ints>(whose);
        for (long row = 0; row < rows; row++) {
            const Floats score = load<Floats>(c + row * stride);
            const Ints higher = score > top;
            tokens = (tokens & ~higher) | (((int32_t)(begin + row) + Ints{}) & higher);
            top = larger(top, score);
        }
        store(whose, tokens);
    } else {
        for (long row = 0; row < rows; row++) top = larger(top, load<Floats>(c + row * stride));
    }
    Floats total = load<Floats>(sum) * exponential(before - top);
    for (long row = 0; row < rows; row++) {
        const Floats part = exponential(load<Floats>(c + row * stride) - top);
        total += part;
        if (kept) to_bf16(kept + row * stride, part);
    }
    store(largest, top);
    store(sum, total);
}

void forward(const Sizes& s, Barrier& barrier) {
    const Loss& l = s.l;
    const long me = omp_get_thread_num(), team = omp_get_num_threads();
    float* const largest = l.sums + 3 * me * s.n;
    float* const sum = largest + s.n;
    int32_t* const whose = l.predicted ? (int32_t*)(sum + s.n) : nullptr;
    std::fill(largest, largest + s.n, -FLT_MAX);  // of which, unlike of infinity, differences are numbers
    std::fill(sum, sum + 2 * s.n, 0.0f);
    Bits* const a = (Bits*)scratch.take(sizeof(Bits) * ROWS * s.h + sizeof(float) * ROWS * PANEL);
    float* const c = (float*)(a + ROWS * s.h);
    const Part panels(s.panels, 1);
    for (long p = panels.begin; p < panels.end; p++)
        pack_by_position(l, s.first(p) * LANES, s.width(p), l.packed + s.first(p) * LANES * s.h);
    barrier.wait(team);
    const Part part(l.vocabulary, ROWS);
    for (long begin = part.begin; begin < part.end; begin += ROWS) {
        const long rows = std::min(ROWS, part.end - begin);
        for (long row = 0; row < rows; row++)
            for (long k = 0; k < s.h; k += LANES) to_bf16(a + row * s.h + k, weights_at(l, begin + row, k));
        for (long p = 0; p < s.panels; p++) {
            const long width = s.width(p), stride = width * LANES, first = s.first(p) * LANES;
            for (long row = 0; row < rows; row++)
                for (long v = 0; v < width; v++) store(c + row * stride + v * LANES, splat(l.bias[begin + row]));
            multiply(l, width, a, s.h, l.packed + first * s.h, unit_pairs(l), c, rows);
            for (long position = first; position < std::min(first + stride, l.positions); position++) {
                const long row = l.targets[position] - begin;
                if (row >= 0 && row < rows) l.found[position] = c[row * stride + position - first];
            }
            for (long v = 0; v < width; v++)
                add_exponentials(
                    c + v * LANES, stride, begin, rows, largest + first + v * LANES, sum + first + v * LANES,
                    whose ? whose + first + v * LANES : nullptr,
                    l.kept ? s.kept(p) + begin * stride + v * LANES : nullptr);
        }
        if (l.kept) std::copy(largest, largest + s.n, l.tops + begin / ROWS * s.n);
    }
    barrier.wait(team);
    const Part mine(s.n, LANES);
    for (long n = mine.begin; n < mine.end; n++) {
        float top = -INFINITY, total = 0.0f;
        if (l.predicted && n < l.positions) l.predicted[n] = 0;
        for (long t = 0; t < team; t++) {
            const float* const part = l.sums + 3 * t * s.n + n;
            if (l.predicted && n < l.positions && part[0] > top) {
                int32_t token;
                std::memcpy(&token, part + 2 * s.n, sizeof token);
                l.predicted[n] = token;
            }
            top = std::max(part[0], top);
        }
        for (long t = 0; t < team; t++) {
            const float* const part = l.sums + 3 * t * s.n + n;
            total += part[s.n] * std::exp(part[0] - top);
        }
        l.lse[n] = top + std::log(total);
    }
}

// What makes probabilities, times their factors, of a block's exponentials.
inline Floats scale_at(const Sizes& s, long block, long position) {
    const Floats top = load<Floats>(s.l.tops + block * s.n + position);
    return exponential(top - load<Floats>(s.l.lse + position)) * load<Floats>(s.l.factors + position);
}

// A thread's work of backward: the rows of the vocabulary that it has, and its part of the features' gradient.
struct BackwardWorker {
    const Sizes& s;
    const Loss& l;
    Bits *rows, *pairs, *turned;
    float *c, *scales, *gathered;

    explicit BackwardWorker(const Sizes& sizes) : s(sizes), l(sizes.l) {
        const long halves = ROWS * (2 * s.n + s.h), floats = ROWS * PANEL + s.n;
        rows = (Bits*)scratch.take(sizeof(Bits) * halves + sizeof(float) * floats);
        pairs = rows + ROWS * s.n;    // gradients of a block's scores as the right factor; ``rows`` as the left
        turned = pairs + ROWS * s.n;  // (h, ROWS): the block's weights, transposed
        c = (float*)(turned + ROWS * s.h);
        scales = c + ROWS * PANEL;
        gathered = l.gathered + omp_get_thread_num() * s.h * s.n;
    }

    Bits* panel_pairs(long panel) const { return pairs + s.first(panel) * LANES * ROWS; }

    // A block's exponentials become the gradients of the scores; adds up the biases' gradients.
    void differentiate(long begin, long end) const {
        Floats d_bias[ROWS] = {};
        for (long p = 0; p < s.panels; p++) {
            const long stride = s.width(p) * LANES, first = s.first(p) * LANES;
            const Bits* parts = s.kept(p) + begin * stride;
            Bits *to = rows + first, *to_pairs = panel_pairs(p);
            for (long row = begin; row < end; row += 2, parts += 2 * stride, to += 2 * s.n, to_pairs += 2 * stride)
                for (long v = 0; v < stride; v += LANES) {
                    Floats d[2] = {};
                    for (long i = 0; i < 2 && row + i < l.vocabulary; i++) {
                        d[i] = from_bf16(parts + i * stride + v) * load<Floats>(scales + first + v);
                        d_bias[row + i - begin] += d[i];
                    }
                    for (long i = 0; i < 2; i++) to_bf16(to + i * s.n + v, d[i]);
                    store(to_pairs + 2 * v, paired(d[0], d[1]));
                }
        }
        for (long row = begin; row < std::min(end, l.vocabulary); row++) {
            float total = l.adds ? l.d_bias[row] : 0.0f;
            for (long lane = 0; lane < LANES; lane++) total += d_bias[row - begin][lane];
            l.d_bias[row] = total;
        }
    }

    // The targets' own gradients, from scores that were never rounded: they are the smallest differences.
    void differentiate_targets(long begin, long end) const {
        for (long p = 0; p < s.panels; p++) {
            const long stride = s.width(p) * LANES, first = s.first(p) * LANES;
            for (long position = first; position < std::min(first + stride, l.positions); position++) {
                const long row = l.targets[position];
                if (row < begin || row >= end) continue;
                const float found = l.found[position], lse = l.lse[position], factor = l.factors[position];
                const float d = std::expm1(found - lse) * factor;
                const float top = l.tops[begin / ROWS * s.n + position];
                Bits sixteen[LANES];
                to_bf16(sixteen, exponential(splat(found - top)));
                l.d_bias[row] += d - from_bf16(sixteen)[0] * scales[position];  // what was added before
                const long at = row - begin;
                panel_pairs(p)[(at & ~1L) * stride + 2 * (position - first) + (at & 1)] = bf16_of(d);
                rows[at * s.n + position] = bf16_of(d);
            }
        }
    }

    // The gradient of a block's weights.
    void differentiate_weights(long begin, long end) const {
        const long count = std::min(end, l.vocabulary) - begin;
        if (count <= 0) return;
        for (long unit = 0; unit < l.hidden; unit += PANEL) {
            const long n = width(unit, l.hidden);
            const size_t size = sizeof(float) * std::min(n * LANES, l.hidden - unit);
            float* const to = l.d_weight + begin * l.hidden + unit;
            std::memset(c, 0, sizeof(float) * count * n * LANES);
            if (l.adds)
                for (long row = 0; row < count; row++) std::memcpy(c + row * n * LANES, to + row * l.hidden, size);
            multiply(l, n, rows, s.n, l.packed + unit * s.n, s.n / 2, c, count);
            for (long row = 0; row < count; row++) std::memcpy(to + row * l.hidden, c + row * n * LANES, size);
        }
    }

    // Adds a block's part of the features' gradient, transposed; its left factor are the weights, transposed.
    void differentiate_features(long begin, long end) const {
        for (long k = 0; k < end - begin; k += 2 * LANES)
            for (long unit = 0; unit < s.h; unit += LANES) {
                Words words[LANES];
                for (long i = 0; i < LANES; i++) {
                    const long row = begin + k + 2 * i;
                    words[i] = paired(weights_at(l, row, unit), weights_at(l, row + 1, unit));
                }
                transpose(words);
                for (long i = 0; i < LANES; i++) store(turned + (unit + i) * ROWS + k, words[i]);
            }
        for (long p = 0; p < s.panels; p++) {
            float* const to = gathered + s.first(p) * LANES * s.h;
            multiply(l, s.width(p), turned, ROWS, panel_pairs(p), (end - begin) / 2, to, l.hidden);
        }
    }

    void run() const {
        std::fill(gathered, gathered + s.h * s.n, 0.0f);
        const Part part(s.v, ROWS);
        for (long begin = part.begin; begin < part.end; begin += ROWS) {
            const long end = std::min(begin + ROWS, part.end);
            for (long n = 0; n < s.n; n += LANES) store(scales + n, scale_at(s, begin / ROWS, n));
            differentiate(begin, end);
            differentiate_targets(begin, end);
            differentiate_weights(begin, end);
            differentiate_features(begin, end);
        }
    }
};

// The features' gradient of the threads' parts, turned.
void sum_features(const Sizes& s) {
    const Loss& l = s.l;
    const Part part(s.panels, 1);
    for (long p = part.begin; p < part.end; p++)
        for (long v = 0; v < s.width(p); v++)
            for (long unit = 0; unit < l.hidden; unit += LANES) {
                Words sums[LANES];
                for (long i = 0; i < LANES; i++) {
                    const float* from = l.gathered + s.first(p) * LANES * s.h + ((unit + i) * s.width(p) + v) * LANES;
                    Floats sum{};
                    for (long t = 0; t < omp_get_num_threads(); t++) sum += load<Floats>(from + t * s.h * s.n);
                    sums[i] = (Words)sum;
                }
                transpose(sums);
                const long first = (s.first(p) + v) * LANES;
                for (long i = 0; i < std::min(LANES, l.positions - first); i++)
                    store_bf16(l.d_features + (first + i) * l.hidden + unit, (Floats)sums[i], l.hidden - unit);
            }
}

void backward(const Sizes& s, Barrier& barrier) {
    const long team = omp_get_num_threads();
    const Part units(s.l.hidden, PANEL);
    for (long unit = units.begin; unit < units.end; unit += PANEL)
        pack_by_unit(s.l, 0, s.n, unit, width(unit, s.l.hidden), s.l.packed + unit * s.n);
    barrier.wait(team);
    BackwardWorker(s).run();
    barrier.wait(team);
    sum_features(s);
}

// Small vocabularies -----------------------------------------------------------------------

constexpr long GROUP = 256;  // positions whose gradients are summed over together

// A thread's work on a small vocabulary.
struct SmallWorker {
    const SmallLoss& l;
    const long h, v, pairs;  // hidden and vocabulary, padded; pairs of tokens
    float* const own_sums;   // panels of (V, hidden units), then (V, LANES) of the biases'
    Bits *by_unit, *by_position, *d, *turned;
    float* c;

    explicit SmallWorker(const SmallLoss& loss)
        : l(loss), h(up(loss.hidden, 2 * LANES)), v(up(loss.vocabulary, 2 * LANES)), pairs((loss.vocabulary + 1) / 2),
          own_sums(loss.sums ? loss.sums + omp_get_thread_num() * part_size() : nullptr) {
        const long halves = PANEL * (h + GROUP + v) + v * GROUP;
        by_unit = (Bits*)scratch.take(sizeof(Bits) * halves + sizeof(float) * std::max(l.vocabulary, PANEL) * PANEL);
        by_position = by_unit + h * PANEL;   // PANEL × GROUP: features as the right factor, by pairs of positions
        d = by_position + PANEL * GROUP;     // (v, GROUP): gradients of the scores
        turned = d + v * GROUP;              // (PANEL, v): some of them, transposed
        c = (float*)(turned + v * PANEL);
    }

    long part_size() const { return l.vocabulary * (h + LANES); }

    void pack_weights() const {
        const Part rows(l.vocabulary, 1);
        for (long row = rows.begin; row < rows.end; row++)
            for (long unit = 0; unit < h; unit += LANES) to_bf16(l.left + row * h + unit, weights_at(l, row, unit));
        if (!l.factor) return;
        const Part units(l.hidden, PANEL);
        for (long begin = units.begin; begin < units.end; begin += PANEL) {
            Bits* to = l.right + begin * 2 * pairs;
            for (long row = 0; row < 2 * pairs; row += 2)
                for (long unit = begin; unit < units.end && unit < begin + PANEL; unit += LANES, to += 2 * LANES)
                    store(to, paired(weights_at(l, row, unit), weights_at(l, row + 1, unit)));
        }
    }

    // Scores (V, positions) of ``n`` vectors of positions.
    void score(long first, long n) const {
        pack_by_position(l, first, n, by_unit);
        for (long row = 0; row < l.vocabulary; row++)
            for (long j = 0; j < n; j++) store(c + (row * n + j) * LANES, splat(l.bias[row]));
        multiply(l, n, l.left, h, by_unit, unit_pairs(l), c, l.vocabulary);
    }

    // Losses of one vector of positions, whose scores are ``stride`` apart; with gradients their scores' into ``to``.
    void differentiate(long first, float* scores, long stride, Bits* to) const {
        const long count = std::min(LANES, l.positions - first);
        Floats top = splat(-INFINITY), total{}, found{}, factors{};
        Ints tokens{};
        for (long row = 0; row < l.vocabulary; row++) {
            const Floats score = load<Floats>(scores + row * stride);
            const Ints higher = score > top;
            tokens = (tokens & ~higher) | (((int32_t)row + Ints{}) & higher);
            top = larger(top, score);
        }
        for (long i = 0; i < count; i++) {
            const long target = l.targets[first + i];
            if (l.predicted) l.predicted[first + i] = tokens[i];
            if (target < 0) continue;
            found[i] = scores[target * stride + i];
            if (l.factor) factors[i] = *l.factor;
        }
        for (long row = 0; row < l.vocabulary; row++) {
            const Floats part = exponential(load<Floats>(scores + row * stride) - top);
            total += part;
            store(scores + row * stride, part);
        }
        float lse[LANES];
        for (long i = 0; i < count; i++) {
            lse[i] = top[i] + std::log(total[i]);
            l.losses[first + i] = l.targets[first + i] < 0 ? 0.0f : lse[i] - found[i];
        }
        if (!l.factor) return;
        float* const d_bias = own_sums + l.vocabulary * h;
        const Floats scale = factors / total;
        for (long row = 0; row < l.vocabulary; row++) {
            const Floats part = load<Floats>(scores + row * stride) * scale;
            store(d_bias + row * LANES, load<Floats>(d_bias + row * LANES) + part);
            to_bf16(to + row * GROUP, part);
        }
        // The target's own from scores that were never rounded: it is the smallest difference.
        for (long i = 0; i < count; i++) {
            const long target = l.targets[first + i];
            if (target < 0) continue;
            const float part = std::expm1(found[i] - lse[i]) * factors[i];
            d_bias[target * LANES + i] += part - scores[target * stride + i] * scale[i];
            to[target * GROUP + i] = bf16_of(part);
        }
    }

    // Gradients of the features of ``n`` vectors of positions, from those of their scores.
    void differentiate_features(long first, long n, const Bits* from) const {
        for (long row = 0; row < v; row += 2 * LANES)
            for (long j = 0; j < n; j++) {
                Words block[LANES];
                for (long i = 0; i < LANES; i++) {
                    const Bits* const two = from + (row + 2 * i) * GROUP + j * LANES;
                    block[i] = interleaved(load<Halves>(two), load<Halves>(two + GROUP));
                }
                transpose(block);
                for (long i = 0; i < LANES; i++) store(turned + (j * LANES + i) * v + row, block[i]);
            }
        const long count = std::min(n * LANES, l.positions - first);
        for (long begin = 0; begin < l.hidden; begin += PANEL) {
            const long stride = width(begin, l.hidden) * LANES;
            for (long i = first + PANEL; i < std::min(first + 2 * PANEL, l.positions); i++) {  // while this is computed
                const Bits* const next = l.features + i * l.stride + begin;
                __builtin_prefetch(next, 0, 2);
                if (begin + 2 * LANES < l.hidden) __builtin_prefetch(next + 2 * LANES, 0, 2);
            }
            std::memset(c, 0, sizeof(float) * count * stride);
            multiply(l, stride / LANES, turned, v, l.right + begin * 2 * pairs, pairs, c, count);
            for (long i = 0; i < count; i++)
                for (long unit = begin; unit < std::min(begin + stride, l.hidden); unit += LANES) {
                    const Floats values = load<Floats>(c + i * stride + unit - begin);
                    store_bf16(l.d_features + (first + i) * l.hidden + unit, values, l.hidden - unit);
                }
        }
    }

    // Adds a group's part of the weights' gradient.
    void differentiate_weights(long first, long count) const {
        for (long begin = 0; begin < l.hidden; begin += PANEL) {
            const long n = width(begin, l.hidden);
            pack_by_unit(l, first, count, begin, n, by_position);
            multiply(l, n, d, GROUP, by_position, count / 2, own_sums + begin * l.vocabulary, l.vocabulary);
        }
    }

    // The gradients of weights and biases, of the threads' parts.
    void sum_parts() const {
        const long team = omp_get_num_threads(), size = part_size();
        const Part rows(l.vocabulary, 1);
        for (long row = rows.begin; row < rows.end; row++) {
            float bias = 0.0f;
            for (long t = 0; t < team; t++)
                for (long lane = 0; lane < LANES; lane++)
                    bias += l.sums[t * size + l.vocabulary * h + row * LANES + lane];
            l.d_bias[row] = bias;
            for (long unit = 0; unit < l.hidden; unit += LANES) {
                const long begin = unit / PANEL * PANEL;
                const float* from = l.sums + begin * l.vocabulary + row * width(begin, l.hidden) * LANES + unit - begin;
                Floats sum{};
                for (long t = 0; t < team; t++) sum += load<Floats>(from + t * size);
                std::memcpy(l.d_weight + row * l.hidden + unit, &sum, sizeof(float) * std::min(LANES, l.hidden - unit));
            }
        }
    }

    void run(Barrier& barrier) const {
        const long team = omp_get_num_threads();
        pack_weights();
        if (l.factor) {
            std::fill(own_sums, own_sums + part_size(), 0.0f);
            std::memset(d + l.vocabulary * GROUP, 0, sizeof(Bits) * (v - l.vocabulary) * GROUP);
        }
        barrier.wait(team);
        const Part part(up(l.positions, LANES), LANES);
        for (long group = part.begin; group < part.end; group += GROUP) {
            const long count = std::min(GROUP, part.end - group);
            for (long at = 0; at < count; at += PANEL) {
                const long first = group + at, n = width(at, count);
                score(first, n);
                for (long j = 0; j < n; j++)
                    differentiate(first + j * LANES, c + j * LANES, n * LANES, d + at + j * LANES);
                if (l.factor) differentiate_features(first, n, d + at);
            }
            if (l.factor) differentiate_weights(group, count);
        }
        barrier.wait(team);
        if (l.factor) sum_parts();
    }
};

}  // namespace

extern "C" {

int elman_has_tiles() { return has_tile_product(); }

void elman_linear_loss(const Loss* loss, int is_forward) {
    const Sizes sizes(*loss);
    Barrier barrier;
#pragma omp parallel num_threads(loss->threads)
    {
        (is_forward ? forward : backward)(sizes, barrier);
        release_tiles();
    }
}

void elman_small_loss(const SmallLoss* loss) {
    Barrier barrier;
#pragma omp parallel num_threads(loss->threads)
    {
        SmallWorker(*loss).run(barrier);
        release_tiles();
    }
}

}
