// One day of an LSTM, forward and backward; cells are the last axis of all arrays. Called by lstm.py.
//
// Products of this size are bound by what moves between registers and caches: a tile of gates and cells is
// added up in registers, and activated before it leaves them. Each cell gets the same operations in the same
// order, wherever it lies, whichever day it is, however many threads there are.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

using at::Tensor;

// Rows come in panels of four: a unit's gates, four inputs. A tile is PANELS panels times VECTORS vectors: as
// many as there are registers for.
#if defined(__AVX512F__)
constexpr int LANES = 16, PANELS = 2, VECTORS = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, PANELS = 1, VECTORS = 3;
#else
constexpr int LANES = 4, PANELS = 1, VECTORS = 2;
#endif
constexpr int PANEL = 4, WIDTH = VECTORS * LANES;
// numbers in a line of the cache, and what cells are a multiple of: no two threads write to one line
constexpr int LINE = 16;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float *from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// Nothing is left to be computed: x - 0 is x, but 0 + x is not where x is -0.
static inline Vector all(float value) { return value - Vector{}; }

static inline void store(float *to, Vector values) { std::memcpy(to, &values, sizeof values); }

// For what is read much later: past the caches, where it would take the place of what is needed before.
static inline void put_aside(float *to, Vector values) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)values);
#else
    store(to, values);
#endif
}

// The higher of both and the lower of both; NaN if the second is NaN.
#if defined(__AVX512F__)
static inline Vector higher(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Vector lower(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
static inline Vector higher(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Vector lower(Vector a, Vector b) { return (Vector)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline Vector higher(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector lower(Vector a, Vector b) { return a < b ? a : b; }
#endif

// e^-x of several at once, step by step: each step waits for the one before. -x is n ln 2 minus a rest, of
// which e^-rest is a polynomial (of least largest error); to float32 round-off, without FMA up to four times
// that where a sigmoid sees it. Beyond 43 and -43 it stays what it is there, so that one divided by the product
// of two is still a normal number; a sigmoid does not see the difference.
template <int count>
static inline void exponentials(Vector (&x)[count]) {
    const Vector low = all(-43.0f), high = all(43.0f), rounder = all(12582912.0f);
    constexpr float terms[] = {-8.3687166e-3f, 4.1668389e-2f, -1.6666521e-1f, 4.9999994e-1f, -1.0f, 1.0f};
    Vector rounded[count], rest[count];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        x[i] = lower(high, higher(low, x[i]));
        rounded[i] = x[i] * -1.44269504f + rounder;
        rest[i] = x[i] + (rounded[i] - rounder) * 0.693147181f;
        x[i] = all(1.3814599e-3f);
    }
#pragma GCC unroll 8
    for (float term : terms)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) x[i] = x[i] * rest[i] + term;
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        // n is what the last bits of `rounded` count, 2^n what they are as an exponent
        Integers bits;
        std::memcpy(&bits, &rounded[i], sizeof bits);
        bits = (bits << 23) + 0x3f800000;
        Vector power;
        std::memcpy(&power, &bits, sizeof power);
        x[i] *= power;
    }
}

// The left factor of a product: where its next panel, its next column and its next row lie.
struct Left {
    const float *at;
    long panel, column, row;
};

// The right factor: where its next row and its next vector lie.
struct Right {
    const float *at;
    long row, vector;
};

template <int panels, int vectors>
using Tile = Vector[panels * PANEL][vectors];

// sums += left * right
template <int panels, int vectors>
static inline void add_product(Tile<panels, vectors> &sums, Left left, Right right, long length) {
    for (long k = 0; k < length; k++) {
        Vector values[vectors];
        for (int v = 0; v < vectors; v++) values[v] = load(right.at + k * right.row + v * right.vector);
#pragma GCC unroll 8
        for (int row = 0; row < panels * PANEL; row++) {
            const Vector factor =
                all(left.at[row / PANEL * left.panel + k * left.column + row % PANEL * left.row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[row][v] += factor * values[v];
        }
    }
}

// Does panels from `first` up to `stop`, as many at a time as there are registers for.
template <typename Work>
static inline void each_panel(long first, long stop, Work work) {
    for (; first + PANELS <= stop; first += PANELS) work.template operator()<PANELS>(first);
    for (; first < stop; first++) work.template operator()<1>(first);
}

// Does columns from `first` up to `stop`, a tile at a time; the last ones may have fewer vectors.
template <int vectors = VECTORS, typename Work>
static inline void each_tile(long first, long stop, Work work) {
    // four vectors are two times two: one alone takes as long as two
    const auto fits = [&](long left) { return left >= vectors && (vectors != 3 || left != 4); };
    for (; fits((stop - first) / LANES); first += vectors * LANES) work.template operator()<vectors>(first);
    if constexpr (vectors > 1) each_tile<vectors - 1>(first, stop, work);
}

static inline long padded(long columns) { return (columns + LANES - 1) / LANES * LANES; }

// Rows of a tile's cells one behind the other: far apart they would take each other's places in the cache.
static float *gathered(const float *rows, long count, long cells, long at, long width, float *to) {
    for (long row = 0; row < count; row++, to += WIDTH) std::memcpy(to, rows + row * cells + at, 4 * width);
    return to;
}

// Rows from `first` up to `stop` with cells as rows, [vector of rows, cell, row of the vector]; null for zeros.
static void transposed(const float *rows, long first, long stop, long cells, long at, long width, float *to) {
    for (long row = first; row < stop; row++) {
        float *column = to + row / LANES * LANES * cells + row % LANES;
        for (long cell = at; cell < at + width; cell++)
            column[cell * LANES] = rows ? rows[(row - first) * cells + cell] : 0.0f;
    }
}

struct Free {
    void operator()(float *memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<float[], Free>;

// Memory for what is written before it is read; vectors lie within lines of the cache.
static Scratch scratch(long size) {
    constexpr long bytes = sizeof(float) * LINE;
    void *memory = std::aligned_alloc(bytes, (size + LINE - 1) / LINE * bytes);
    if (!memory) throw std::bad_alloc();
    return Scratch(static_cast<float *>(memory));
}

struct Sizes {
    long hidden, others, heads, cells;
    long inputs() const { return hidden + others; }
    long gate() const { return hidden * cells; }
    // where the gates of a unit are remembered, for a vector of cells: in the order in which they are needed
    long remembered(long unit, long at) const { return (at * hidden + unit * LANES) * PANEL; }
};

struct Forward {
    Sizes size;
    const float *weights;        // [unit, input, gate]
    const float *heads_weights;  // [panel of heads, unit, head of the panel]
    const float *constant;       // [gate, unit, cell]
    const float *hidden, *others, *cell;
    float *heads, *next_hidden, *next_cell, *gates;  // gates as remembered, or null
};

// The gates of a unit, in their order, for some vectors. Two share a division, which takes as long as many
// products; what is no number in one of the two is none in the other. The cell is the only sum of two products:
// compilers have to contract the same one for tiles of all sizes, which a test looks after.
template <int vectors>
static inline void activate(const Forward &day, long unit, long at, float *tile,
                            const Vector (*sums)[vectors]) {
    const long here = unit * day.size.cells + at;
    Vector read[vectors], shown[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        Vector below[PANEL] = {sums[0][v], sums[1][v], sums[2][v] + sums[2][v], sums[3][v]};
        exponentials(below);
        for (Vector &value : below) value += 1.0f;
        const Vector inward = 1.0f / (below[0] * below[2]), onward = 1.0f / (below[1] * below[3]);
        const Vector write = inward * below[2], candidate = 2.0f * (inward * below[0]) - 1.0f,
                     keep = onward * below[3];
        read[v] = onward * below[1];
        const Vector cell = keep * load(day.cell + here + v * LANES) + write * candidate;
        store(day.next_cell + here + v * LANES, cell);
        shown[v] = cell + cell;
        if (!day.gates) continue;
        float *gates = day.gates + day.size.remembered(unit, at + v * LANES);
        put_aside(gates, write);
        put_aside(gates + LANES, keep);
        put_aside(gates + 2 * LANES, candidate);
        put_aside(gates + 3 * LANES, read[v]);
    }
    exponentials(shown);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const Vector hidden = read[v] * (2.0f / (1.0f + shown[v]) - 1.0f);
        store(day.next_hidden + here + v * LANES, hidden);
        store(tile + v * LANES, hidden);
    }
}

template <int vectors>
static void forward_tile(const Forward &day, long at, float *inputs, float *hidden) {
    const Sizes &size = day.size;
    float *others = gathered(day.hidden, size.hidden, size.cells, at, vectors * LANES, inputs);
    gathered(day.others, size.others, size.cells, at, vectors * LANES, others);
    each_panel(0, size.hidden, [&]<int panels>(long unit) {
        Tile<panels, vectors> sums;
        for (int row = 0; row < panels * PANEL; row++)
            for (int v = 0; v < vectors; v++)
                sums[row][v] = load(day.constant + row % PANEL * size.gate() +
                                    (unit + row / PANEL) * size.cells + at + v * LANES);
        const Left weights{day.weights + unit * PANEL * size.inputs(), PANEL * size.inputs(), PANEL, 1};
        add_product<panels, vectors>(sums, weights, {inputs, WIDTH, LANES}, size.inputs());
        for (int u = 0; u < panels; u++)
            activate<vectors>(day, unit + u, at, hidden + (unit + u) * WIDTH, sums + PANEL * u);
    });
    each_panel(0, size.heads / PANEL, [&]<int panels>(long panel) {
        Tile<panels, vectors> sums = {};
        const Left weights{day.heads_weights + panel * PANEL * size.hidden, PANEL * size.hidden, PANEL, 1};
        add_product<panels, vectors>(sums, weights, {hidden, WIDTH, LANES}, size.hidden);
        for (int row = 0; row < panels * PANEL; row++)
            for (int v = 0; v < vectors; v++)
                store(day.heads + (panel * PANEL + row) * size.cells + at + v * LANES, sums[row][v]);
    });
}

struct Backward {
    Sizes size;
    const float *weights;  // [panel of inputs, gate and unit, input of the panel], the last panel filled up
    const float *heads_weights;  // [panel of units, head, unit of the panel]
    const float *gates, *cell, *hidden, *others, *next_hidden;
    const float *heads_slope, *next_hidden_slope, *next_cell_slope;
    float *weights_slope;        // [gate and unit, input]
    float *heads_weights_slope;  // [unit, head]
    float *constant_slope;       // [gate, unit, cell]
    float *hidden_slope, *others_slope, *cell_slope;
    float *inputs_of, *heads_of;  // inputs and slopes of heads as `transposed`, filled up to whole vectors
};

// Slopes of the gates of a unit before their activation, for a vector of cells; also to the tile.
static inline void activate_back(const Backward &day, long unit, long at, Vector hidden_slope, float *tile) {
    const long here = unit * day.size.cells + at;
    const float *gates = day.gates + day.size.remembered(unit, at);
    const Vector write = load(gates), keep = load(gates + LANES), candidate = load(gates + 2 * LANES),
                 read = load(gates + 3 * LANES), hidden = load(day.next_hidden + here);
    // hidden = read * tanh(cell), and no read is zero: exponentials end at 43
    const Vector slope =
        load(day.next_cell_slope + here) + hidden_slope * (read - hidden * (hidden / read));
    const Vector slopes[PANEL] = {
        slope * candidate * write * (1.0f - write), slope * load(day.cell + here) * keep * (1.0f - keep),
        slope * write * (1.0f - candidate * candidate), hidden_slope * hidden * (1.0f - read)};
    store(day.cell_slope + here, slope * keep);
    for (int g = 0; g < PANEL; g++) {
        store(day.constant_slope + g * day.size.gate() + here, slopes[g]);
        store(tile + g * day.size.hidden * WIDTH, slopes[g]);
    }
}

// Slopes of gates, cell, hidden state and other inputs, for some cells.
template <int vectors>
static void backward_tile(const Backward &day, long at, float *heads, float *gates) {
    const Sizes &size = day.size;
    const long width = vectors * LANES, rows = PANEL * size.hidden;
    gathered(day.heads_slope, size.heads, size.cells, at, width, heads);
    each_panel(0, size.hidden / PANEL, [&]<int panels>(long panel) {
        Tile<panels, vectors> sums = {};
        const Left weights{day.heads_weights + panel * PANEL * size.heads, PANEL * size.heads, PANEL, 1};
        add_product<panels, vectors>(sums, weights, {heads, WIDTH, LANES}, size.heads);
        for (int row = 0; row < panels * PANEL; row++)
            for (int v = 0; v < vectors; v++) {
                const long unit = panel * PANEL + row, from = at + v * LANES;
                const Vector slope = sums[row][v] + load(day.next_hidden_slope + unit * size.cells + from);
                activate_back(day, unit, from, slope, gates + unit * WIDTH + v * LANES);
            }
    });
    each_panel(0, (size.inputs() + PANEL - 1) / PANEL, [&]<int panels>(long panel) {
        Tile<panels, vectors> sums = {};
        const Left weights{day.weights + panel * PANEL * rows, PANEL * rows, PANEL, 1};
        add_product<panels, vectors>(sums, weights, {gates, WIDTH, LANES}, rows);
        for (long row = 0; row < std::min<long>(panels * PANEL, size.inputs() - panel * PANEL); row++) {
            const long input = panel * PANEL + row;
            float *to = input < size.hidden ? day.hidden_slope + input * size.cells
                                            : day.others_slope + (input - size.hidden) * size.cells;
            for (int v = 0; v < vectors; v++) store(to + at + v * LANES, sums[row][v]);
        }
    });
    transposed(day.hidden, 0, size.hidden, size.cells, at, width, day.inputs_of);
    transposed(day.others, size.hidden, size.inputs(), size.cells, at, width, day.inputs_of);
    transposed(nullptr, size.inputs(), padded(size.inputs()), size.cells, at, width, day.inputs_of);
    transposed(day.heads_slope, 0, size.heads, size.cells, at, width, day.heads_of);
    transposed(nullptr, size.heads, padded(size.heads), size.cells, at, width, day.heads_of);
}

// to[row, column] = sum over cells of left[row, cell] * right[cell, column], for some panels of rows
static void sum_over_cells(const float *left, const float *right, float *to, long columns, long cells,
                           long first, long stop) {
    each_tile(0, padded(columns), [&]<int vectors>(long column) {
        each_panel(first, stop, [&]<int panels>(long panel) {
            Tile<panels, vectors> sums = {};
            const Left factor{left + panel * PANEL * cells, PANEL * cells, 1, cells};
            add_product<panels, vectors>(sums, factor, {right + column * cells, LANES, LANES * cells}, cells);
            const long width = std::min<long>(vectors * LANES, columns - column);
            for (long row = 0; row < panels * PANEL; row++)
                std::memcpy(to + (panel * PANEL + row) * columns + column, sums[row], 4 * width);
        });
    });
}

// What each of all threads does of some work: from share(which) up to share(which + 1), in whole `unit`s.
struct Shares {
    long work, unit, count = at::get_num_threads();
    long operator()(long which) const { return work / unit * which / count * unit; }
};

static float *memory(const Tensor &tensor) { return tensor.data_ptr<float>(); }

// Tensors whose rows lie one behind the other, copied where they did not.
class Whole {
   public:
    explicit Whole(std::vector<Tensor> given) : tensors(std::move(given)) {
        for (Tensor &tensor : tensors) tensor = tensor.contiguous();
    }
    const float *operator[](size_t which) const { return memory(tensors[which]); }

   private:
    std::vector<Tensor> tensors;
};

static void require_shape(const char *name, const Tensor &tensor, at::IntArrayRef expected) {
    TORCH_CHECK_VALUE(tensor.sizes() == expected, name, " have shape ", tensor.sizes(), ", expected ",
                      expected, ": the inputs of a day do not fit its weights");
}

static void require_sizes(const Sizes &size) {
    TORCH_CHECK_VALUE(size.cells % LINE == 0, size.cells, " cells, which is no multiple of 16: fill them up");
    TORCH_CHECK_VALUE(size.hidden % PANEL == 0, size.hidden, " hidden units, which is no multiple of 4");
}

// All tensors [row, cell] unless said otherwise above; heads are filled up to whole panels.
std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor &weights, const Tensor &heads_weights,
                                                        const Tensor &constant, const Tensor &hidden,
                                                        const Tensor &others, const Tensor &cell,
                                                        bool remember) {
    const Sizes size{hidden.size(0), others.size(0), heads_weights.size(0) * PANEL, hidden.size(1)};
    require_sizes(size);
    require_shape("weights", weights, {size.hidden, size.inputs(), PANEL});
    require_shape("weights of heads", heads_weights, {size.heads / PANEL, size.hidden, PANEL});
    require_shape("constant gates", constant, {PANEL * size.hidden, size.cells});
    require_shape("other inputs", others, {size.others, size.cells});
    require_shape("cell states", cell, {size.hidden, size.cells});
    const Whole from({weights, heads_weights, constant, hidden, others, cell});
    const Tensor heads = at::empty({size.heads, size.cells}, hidden.options()),
                 next_hidden = at::empty(hidden.sizes(), hidden.options()),
                 next_cell = at::empty(cell.sizes(), cell.options()),
                 gates = remember ? at::empty(constant.sizes(), constant.options())
                                  : at::empty({0}, constant.options());
    const Forward day{.size = size,
                      .weights = from[0],
                      .heads_weights = from[1],
                      .constant = from[2],
                      .hidden = from[3],
                      .others = from[4],
                      .cell = from[5],
                      .heads = memory(heads),
                      .next_hidden = memory(next_hidden),
                      .next_cell = memory(next_cell),
                      .gates = remember ? memory(gates) : nullptr};
    const Shares cells{size.cells, LINE};
#pragma omp parallel for num_threads(cells.count)
    for (long share = 0; share < cells.count; share++) {
        const auto inputs = scratch(size.inputs() * WIDTH), shown = scratch(size.hidden * WIDTH);
        each_tile(cells(share), cells(share + 1), [&]<int vectors>(long at) {
            forward_tile<vectors>(day, at, inputs.get(), shown.get());
        });
    }
    return {heads, next_hidden, next_cell, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const Tensor &weights, const Tensor &heads_weights, const Tensor &gates, const Tensor &cell,
    const Tensor &hidden, const Tensor &others, const Tensor &next_hidden, const Tensor &heads_slope,
    const Tensor &next_hidden_slope, const Tensor &next_cell_slope) {
    const Sizes size{hidden.size(0), others.size(0), heads_slope.size(0), hidden.size(1)};
    require_sizes(size);
    require_shape("weights", weights, {(size.inputs() + PANEL - 1) / PANEL, PANEL * size.hidden, PANEL});
    require_shape("weights of heads", heads_weights, {size.hidden / PANEL, size.heads, PANEL});
    require_shape("gates", gates, {PANEL * size.hidden, size.cells});
    require_shape("other inputs", others, {size.others, size.cells});
    require_shape("slopes of heads", heads_slope, {size.heads, size.cells});
    for (const Tensor *tensor : {&cell, &next_hidden, &next_hidden_slope, &next_cell_slope})
        require_shape("states and their slopes", *tensor, {size.hidden, size.cells});
    const Whole from({weights, heads_weights, gates, cell, hidden, others, next_hidden, heads_slope,
                      next_hidden_slope, next_cell_slope});
    const auto like = [&](const Tensor &tensor) { return at::empty(tensor.sizes(), tensor.options()); };
    const Tensor weights_slope = at::empty({gates.size(0), size.inputs()}, gates.options()),
                 heads_weights_slope = at::empty({size.hidden, size.heads}, gates.options()),
                 constant_slope = like(gates), hidden_slope = like(hidden), others_slope = like(others),
                 cell_slope = like(cell);
    const auto inputs_of = scratch(size.cells * padded(size.inputs())),
               heads_of = scratch(size.cells * padded(size.heads));
    const Backward day{.size = size,
                       .weights = from[0],
                       .heads_weights = from[1],
                       .gates = from[2],
                       .cell = from[3],
                       .hidden = from[4],
                       .others = from[5],
                       .next_hidden = from[6],
                       .heads_slope = from[7],
                       .next_hidden_slope = from[8],
                       .next_cell_slope = from[9],
                       .weights_slope = memory(weights_slope),
                       .heads_weights_slope = memory(heads_weights_slope),
                       .constant_slope = memory(constant_slope),
                       .hidden_slope = memory(hidden_slope),
                       .others_slope = memory(others_slope),
                       .cell_slope = memory(cell_slope),
                       .inputs_of = inputs_of.get(),
                       .heads_of = heads_of.get()};
    const Shares cells{size.cells, LINE}, units{size.hidden, PANELS}, panels{size.hidden / PANEL, 1};
#pragma omp parallel num_threads(cells.count)
    {
#pragma omp for
        for (long share = 0; share < cells.count; share++) {
            const auto heads = scratch(size.heads * WIDTH), slopes = scratch(PANEL * size.hidden * WIDTH);
            each_tile(cells(share), cells(share + 1), [&]<int vectors>(long at) {
                backward_tile<vectors>(day, at, heads.get(), slopes.get());
            });
        }
#pragma omp for
        for (long share = 0; share < cells.count; share++) {
            sum_over_cells(day.constant_slope, day.inputs_of, day.weights_slope, size.inputs(), size.cells,
                           units(share), units(share + 1));
            sum_over_cells(day.next_hidden, day.heads_of, day.heads_weights_slope, size.heads, size.cells,
                           panels(share), panels(share + 1));
        }
    }
    return {weights_slope, heads_weights_slope, constant_slope, hidden_slope, others_slope, cell_slope};
}

// lstm.py brings both directions together; without this, every call would look for a gradient of its own. A
// call of one direction alone has none, and there are no second derivatives.
TORCH_LIBRARY_IMPL(h2mv_dist, Autograd, operators) {
    operators.impl("lstm_forward", torch::CppFunction::makeFallthrough());
    operators.impl("lstm_backward", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(h2mv_dist, CPU, operators) {
    operators.impl("lstm_forward", &lstm_forward);
    operators.impl("lstm_backward", &lstm_backward);
}
