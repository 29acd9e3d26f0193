// The step of the automaton and its gradient for one tile. Compiled once per instruction set: FASTNCA_ISA names the
// namespace, and only this file gets instruction set flags. So neither it nor the headers that are for it alone
// (simd.h, operands.h, products.h, amx.h) may instantiate anything of the standard library that another object could
// share.
//
// Everything between two states is laid out [cell][channel], and computed for one block of cells after the other.
#include <cstring>

#include "fastnca.h"
#include "operands.h"
#include "products.h"
#include "simd.h"
// The narrowest operand that the instruction set has products of.
#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // GCC's name and Clang's
#include "amx.h"
#define FASTNCA_NARROWEST AmxBf16
#elif defined(__AVX512BF16__)
#define FASTNCA_NARROWEST Bf16
#else
#define FASTNCA_NARROWEST Fp32
#endif

namespace fastnca::FASTNCA_ISA {
namespace {

using Narrowest = FASTNCA_NARROWEST;

// ---------------------------------------------------------------------------------------------------------------
// Scratch memory of a thread

constexpr int kCellVectors = kChannels / kLanes;
constexpr int kMaxBlock = Narrowest::block;
static_assert(kMaxBlock >= Fp32::block, "the memory of a block serves every operand");

struct Scratch {
    // Row strides of the planes, in floats: alpha two cells and the others one cell larger than the tile on every
    // side, and whole vectors may be read from any column.
    int stride;
    float* state;     // [height + 2][width + 2][16], zero outside the grid
    float* gradient;  // the same form
    float* delta;     // [cells][16]: gradient of u
    float* alpha;     // [height + 4][stride]: clamped, -inf outside the grid
    float* life;      // [height + 2][stride]: maximum of alpha over 3x3
    int32_t* winner;  // [height + 2][stride]: where in the 3x3 window that maximum is first, 0...8
    float* life_gradient;  // [height + 2][stride]
    float* perception;     // [kMaxBlock][64], these of any operand
    float* hidden1;        // [kMaxBlock][128]
    float* hidden2;        // [kMaxBlock][64]
    float* update;         // [kMaxBlock][16]
    float* grown;          // [kMaxBlock][16]: delta of living cells, zero of dead ones
    float* inputs_by_cells;  // [kMaxBlock][128] of bf16, as is the next
    float* deltas_by_cells;
    size_t size;

    Scratch(int height, int width, float* base) : size(0) {
        stride = round_up(width + 2, kLanes) + kLanes;
        const int extended = (height + 2) * (width + 2) * kChannels;
        state = take(base, extended);
        gradient = take(base, extended);
        delta = take(base, (height * width + kMaxBlock) * kChannels);
        alpha = take(base, (height + 4) * stride);
        life = take(base, (height + 2) * stride);
        winner = reinterpret_cast<int32_t*>(take(base, (height + 2) * stride));
        life_gradient = take(base, (height + 2) * stride);
        perception = take(base, kMaxBlock * kPerception);
        hidden1 = take(base, kMaxBlock * kHidden1);
        hidden2 = take(base, kMaxBlock * kHidden2);
        update = take(base, kMaxBlock * kChannels);
        grown = take(base, kMaxBlock * kChannels);
        inputs_by_cells = take(base, kMaxBlock * kHidden1 / 2);
        deltas_by_cells = take(base, kMaxBlock * kHidden1 / 2);
    }

private:
    float* take(float* base, int floats) {
        float* taken = base ? base + size : nullptr;
        size += round_up(floats, 16);
        return taken;
    }
};

size_t scratch_floats(int height, int width) { return Scratch(height, width, nullptr).size; }

// ---------------------------------------------------------------------------------------------------------------
// Reading a state: clamp and life mask

// Cells of the tile's sample start here.
FASTNCA_INLINE const float* sample(const float* state, const Tile& tile) {
    return state + tile.cells_before * kChannels;
}

void read_alpha(const float* state, const Tile& tile, const Scratch& scratch) {
    const Grid& grid = *tile.grid;
    const int64_t first = max(tile.x0 - 2, 0), last = min(tile.x0 + tile.width + 2, grid.width);
    for (int r = 0; r < tile.height + 4; r++) {
        float* row = scratch.alpha + r * scratch.stride;
        for (int x = 0; x < scratch.stride; x++) row[x] = -__builtin_inff();
        const int64_t y = tile.y0 + r - 2;
        if (y < 0 || y >= grid.height) continue;
        const float* cells = sample(state, tile) + y * grid.width * kChannels + kAlpha;
        for (int64_t x = first; x < last; x++) row[x - tile.x0 + 2] = clamp01(cells[x * kChannels]);
    }
}

// The life of each cell of the extended tile and, for the backward pass, the cell that it comes from: the first
// maximum of the window in row-major order, where NaN beats everything before it.
template <bool kWithWinner>
void pool_alpha(const Tile& tile, const Scratch& scratch) {
    for (int r = 0; r < tile.height + 2; r++) {
        for (int x = 0; x < tile.width + 2; x += kLanes) {
            const float* window = scratch.alpha + r * scratch.stride + x;
            Vec best = load(window);
            IntVec winner{};
            for (int k = 1; k < 9; k++) {
                const Vec value = load(window + k / 3 * scratch.stride + k % 3);
                const IntVec wins = (value > best) | (value != value);
                best = wins ? value : best;
                if (kWithWinner) winner = wins ? IntVec{} + k : winner;
            }
            store(scratch.life + r * scratch.stride + x, best);
            if (kWithWinner)
                *reinterpret_cast<IntVecMemory*>(scratch.winner + r * scratch.stride + x) = winner;
        }
    }
}

// The state as the step sees it, extended by one cell on every side; and the life of its cells if the step needs it.
void read_state(const float* state, bool masked, bool growth, const Tile& tile, const Scratch& scratch) {
    const Grid& grid = *tile.grid;
    if (masked || growth) {
        read_alpha(state, tile, scratch);
        pool_alpha<false>(tile, scratch);
    }
    const int row_floats = (tile.width + 2) * kChannels;
    const int left = tile.x0 == 0, right = tile.x0 + tile.width == grid.width;
    IntVec is_alpha{};
    is_alpha[kAlpha] = -1;
    for (int r = 0; r < tile.height + 2; r++) {
        const int64_t y = tile.y0 + r - 1;
        float* row = scratch.state + r * row_floats;
        if (y < 0 || y >= grid.height) {
            std::memset(row, 0, row_floats * sizeof(float));
            continue;
        }
        if (left) std::memset(row, 0, kChannels * sizeof(float));
        if (right) std::memset(row + row_floats - kChannels, 0, kChannels * sizeof(float));
        const int first = left, last = tile.width + 2 - right;
        const float* cells = sample(state, tile) + (y * grid.width + tile.x0 - 1) * kChannels;
        if (!masked) {
            std::memcpy(row + first * kChannels, cells + first * kChannels,
                        size_t(last - first) * kChannels * sizeof(float));
            continue;
        }
        const float* alpha = scratch.alpha + (r + 1) * scratch.stride + 1;
        const float* life = scratch.life + r * scratch.stride;
        for (int x = first; x < last; x++) {
            const Vec mask = broadcast(life[x]);
            for (int v = 0; v < kCellVectors; v++) {
                Vec values = load(cells + x * kChannels + v * kLanes);
                if (v == 0) values = is_alpha ? broadcast(alpha[x]) : values;
                store(row + x * kChannels + v * kLanes, values * mask);
            }
        }
    }
}

void write_planar(const float* cells, const Tile& tile, float* planar) {
    const Grid& grid = *tile.grid;
    const int row_floats = (tile.width + 2) * kChannels;
    for (int r = 0; r < tile.height; r++)
        for (int c = 0; c < kChannels; c++) {
            float* out = planar + (c * grid.height + tile.y0 + r) * grid.width + tile.x0;
            const float* in = cells + (r + 1) * row_floats + kChannels + c;
            for (int x = 0; x < tile.width; x++) out[x] = in[x * kChannels];
        }
}

void read(const float* state, bool masked, const Tile& tile, float* planar, float* memory) {
    const Scratch scratch(tile.height, tile.width, memory);
    read_state(state, masked, false, tile, scratch);
    write_planar(scratch.state, tile, planar);
}

// ---------------------------------------------------------------------------------------------------------------
// Stencils

// A run: neighboring cells of one row of the tile that lie in one block.
template <class Body>
FASTNCA_INLINE void for_runs(const Tile& tile, int begin, int cells, const Body& body) {
    int y = begin / tile.width, x = begin % tile.width;
    for (int done = 0; done < cells; y++, x = 0) {
        const int length = min(tile.width - x, cells - done);
        body(done, y, x, length);
        done += length;
    }
}

// state: the first cell of the run in the extended tile. All stencils are products of column and row filters, so that
// the column filters (1 2 1) and (-1 0 1) serve all three, and three neighboring cells. Products with the filters'
// zeros are computed too: of an infinity they are NaN, as in PyTorch.
template <class Operand>
void perceive(const float* state, int row_floats, int length, typename Operand::Element* out) {
    for (int v = 0; v < kCellVectors; v++) {
        const float* cell = state + v * kLanes;
        const auto smooth = [=](const float* p) {
            return load(p - row_floats) + 2.0f * load(p) + load(p + row_floats);
        };
        const auto slope = [=](const float* p) { return load(p + row_floats) - load(p - row_floats) + 0.0f * load(p); };
        Vec smooth0 = smooth(cell - kChannels), smooth1 = smooth(cell);
        Vec slope0 = slope(cell - kChannels), slope1 = slope(cell);
        auto* p = out + v * kLanes;
        for (int x = 0; x < length; x++, cell += kChannels, p += kPerception) {
            const Vec smooth2 = smooth(cell + kChannels), slope2 = slope(cell + kChannels);
            const Vec center = load(cell);
            Operand::store(p, center);
            Operand::store(p + kChannels, smooth2 - smooth0 + 0.0f * smooth1);
            Operand::store(p + 2 * kChannels, slope0 + 2.0f * slope1 + slope2);
            Operand::store(p + 3 * kChannels, smooth0 + 2.0f * smooth1 + smooth2 - 16.0f * center);
            smooth0 = smooth1, smooth1 = smooth2;
            slope0 = slope1, slope1 = slope2;
        }
    }
}

// The transpose of perceive(): adds to the gradient of the run's cells and of all their neighbors. `direct` is what
// reaches a cell past the update network.
void perceive_back(const float* perception, const float* direct, int length, float* gradient, int row_floats) {
    for (int v = 0; v < kCellVectors; v++) {
        const float* p = perception + v * kLanes;
        const float* d = direct + v * kLanes;
        float* out = gradient + v * kLanes - kChannels;
        // Of the cell before, at and after the column that is written.
        Vec rise0{}, slope0{}, slope1{}, bump1{}, center1{}, rise1{};
        for (int x = -1; x <= length; x++, out += kChannels) {
            Vec rise2{}, fall2{}, slope2{}, bump2{}, center2{};
            if (x + 1 < length) {
                const Vec dx = load(p + kChannels);
                bump2 = load(p + 3 * kChannels);
                slope2 = load(p + 2 * kChannels);
                center2 = load(p) + load(d) - 16.0f * bump2;
                rise2 = bump2 + dx;
                fall2 = bump2 - dx;
                p += kPerception;
                d += kChannels;
            }
            const Vec even = rise0 + 2.0f * bump1 + fall2;
            const Vec odd = slope0 + 2.0f * slope1 + slope2;
            store(out - row_floats, load(out - row_floats) + even - odd);
            store(out, load(out) + 2.0f * even + center1);
            store(out + row_floats, load(out + row_floats) + even + odd);
            rise0 = rise1, rise1 = rise2;
            slope0 = slope1, slope1 = slope2;
            bump1 = bump2;
            center1 = center2;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The update network over a block

// A block's intermediates as the operands they are stored as.
template <class Operand>
struct Block {
    using Element = typename Operand::Element;
    Element *perception, *hidden1, *hidden2;

    explicit Block(const Scratch& scratch)
        : perception(reinterpret_cast<Element*>(scratch.perception)),
          hidden1(reinterpret_cast<Element*>(scratch.hidden1)),
          hidden2(reinterpret_cast<Element*>(scratch.hidden2)) {}
};

// The context of the cells of a block, and of those beyond its end, which products compute too.
struct BlockContext {
    const float *rows[kMaxBlock], *columns[kMaxBlock];

    BlockContext(const Context& context, const Tile& tile, int begin, int cells) {
        const Grid& grid = *tile.grid;
        const float* row = context.rows[tile.which] + (tile.sample * grid.height + tile.y0) * kHidden1;
        const float* column = context.columns + (tile.sample * grid.width + tile.x0) * kHidden1;
        for (int cell = cells; cell < kMaxBlock; cell++) rows[cell] = row, columns[cell] = column;
        for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
            for (int i = 0; i < length; i++) {
                rows[done + i] = row + y * kHidden1;
                columns[done + i] = column + (x + i) * kHidden1;
            }
        });
    }
};

// From the extended state in the scratch memory to the last hidden layer.
template <class Operand>
void hidden_layers(const Packed<Operand>& packed, const Context& context, const Tile& tile, int begin, int cells,
                   const Scratch& scratch) {
    const Block<Operand> block(scratch);
    const int row_floats = (tile.width + 2) * kChannels;
    for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
        perceive<Operand>(scratch.state + (y + 1) * row_floats + (x + 1) * kChannels, row_floats, length,
                          block.perception + done * kPerception);
    });
    if (context) {
        const BlockContext places(context, tile, begin, cells);
        Matrix<Operand, kPerception, kHidden1>::product(
            block.perception, packed.w1, packed.b1, cells, [=, &places](int cell, int o, Vec sums) {
                sums += load(places.rows[cell] + o) + load(places.columns[cell] + o);
                Operand::store(block.hidden1 + cell * kHidden1 + o, relu(sums));
            });
    } else {
        Matrix<Operand, kPerception, kHidden1>::product(
            block.perception, packed.w1, packed.b1, cells,
            [=](int cell, int o, Vec sums) { Operand::store(block.hidden1 + cell * kHidden1 + o, relu(sums)); });
    }
    Matrix<Operand, kHidden1, kHidden2>::product(
        block.hidden1, packed.w2, packed.b2, cells,
        [=](int cell, int o, Vec sums) { Operand::store(block.hidden2 + cell * kHidden2 + o, relu(sums)); });
}

// The life around each cell of a run, whose first one is at (y, x) of the tile.
FASTNCA_INLINE const float* run_life(const Scratch& scratch, int y, int x) {
    return scratch.life + (y + 1) * scratch.stride + x + 1;
}

bool anything_lives(const Tile& tile, int begin, int cells, const Scratch& scratch) {
    bool lives = false;
    for_runs(tile, begin, cells, [&](int, int y, int x, int length) {
        for (int i = 0; i < length; i++) lives |= run_life(scratch, y, x)[i] > 0.0f;
    });
    return lives;
}

// Sets what belongs to a block's dead cells, [cell][16], to zero.
void erase_dead(float* values, const Tile& tile, int begin, int cells, const Scratch& scratch) {
    for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
        for (int i = 0; i < length; i++)
            if (!(run_life(scratch, y, x)[i] > 0.0f))
                std::memset(values + (done + i) * kChannels, 0, kChannels * sizeof(float));
    });
}

template <class Operand>
void step(const StepTask& task, const Tile& tile, float* memory) {
    const Packed<Operand>& packed = unpack<Operand>(task.packed);
    const Scratch scratch(tile.height, tile.width, memory);
    const Block<Operand> block(scratch);
    const Grid& grid = *tile.grid;
    const int row_floats = (tile.width + 2) * kChannels;
    read_state(task.from, task.masked, task.growth, tile, scratch);
    const int total = tile.height * tile.width;
    for (int begin = 0; begin < total; begin += Operand::block) {
        const int cells = min(Operand::block, total - begin);
        float* update = scratch.update;
        if (!task.growth || anything_lives(tile, begin, cells, scratch)) {
            hidden_layers(packed, task.context, tile, begin, cells, scratch);
            Matrix<Operand, kHidden2, kChannels>::product(
                block.hidden2, packed.w3, packed.b3, cells,
                [=](int cell, int o, Vec sums) { store(update + cell * kChannels + o, sums); });
        }
        if (task.growth) erase_dead(update, tile, begin, cells, scratch);
        for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
            const float* state = scratch.state + (y + 1) * row_floats + (x + 1) * kChannels;
            const float* change = update + done * kChannels;
            float* to = task.to + (tile.cells_before + (tile.y0 + y) * grid.width + tile.x0 + x) * kChannels;
            for (int i = 0; i < length * kChannels; i += kLanes) store(to + i, load(state + i) + load(change + i));
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Backward

// The gradient of the read state in the extended tile: the sum, in a fixed order, over all tiles whose cells reach
// there. Cells outside the grid are left as they are.
void gather_gradient(const float* gradient, const Tile* tiles, const Tile& tile, const Scratch& scratch) {
    const Grid& grid = *tile.grid;
    const int row_floats = (tile.width + 2) * kChannels;
    const int64_t left = max(tile.x0 - 1, 0), right = min(tile.x0 + tile.width + 1, grid.width);
    const int64_t first_across = max(left - 1, 0) / grid.tile_width;
    const int64_t last_across = min(right, grid.width - 1) / grid.tile_width;
    const int64_t top = max(tile.y0 - 1, 0), bottom = min(tile.y0 + tile.height + 1, grid.height);
    for (int64_t y = top; y < bottom; y++) {
        float* row = scratch.gradient + (y - tile.y0 + 1) * row_floats;
        std::memset(row + (left - tile.x0 + 1) * kChannels, 0, size_t(right - left) * kChannels * sizeof(float));
        const int64_t first_down = max(y - 1, 0) / grid.tile_height;
        const int64_t last_down = min(y + 1, grid.height - 1) / grid.tile_height;
        for (int64_t down = first_down; down <= last_down; down++)
            for (int64_t across = first_across; across <= last_across; across++) {
                const Tile& other = tiles[tile.tiles_before + down * grid.tiles_across + across];
                const int64_t begin = max(left, other.x0 - 1), end = min(right, other.x0 + other.width + 1);
                const float* from = gradient + (other.extended_before + (y - other.y0 + 1) * (other.width + 2) +
                                                (begin - other.x0 + 1)) * kChannels;
                float* to = row + (begin - tile.x0 + 1) * kChannels;
                for (int64_t i = 0; i < (end - begin) * kChannels; i += kLanes)
                    store(to + i, load(to + i) + load(from + i));
            }
    }
}

// From the gradient of the masked state s' = v * life to the gradient of v, and through the clamp's gate to that of u.
void unmask_gradient(const float* state, const Tile& tile, const Scratch& scratch) {
    const Grid& grid = *tile.grid;
    const int stride = scratch.stride, row_floats = (tile.width + 2) * kChannels;
    read_alpha(state, tile, scratch);
    pool_alpha<true>(tile, scratch);

    // What each cell's life receives: zero outside the grid, where there is no cell.
    const int left = tile.x0 == 0, right = tile.width + 2 - (tile.x0 + tile.width == grid.width);
    for (int r = 0; r < tile.height + 2; r++) {
        float* out = scratch.life_gradient + r * stride;
        std::memset(out, 0, stride * sizeof(float));
        const int64_t y = tile.y0 + r - 1;
        if (y < 0 || y >= grid.height) continue;
        const float* cells = sample(state, tile) + (y * grid.width + tile.x0 - 1) * kChannels;
        const float* gradient = scratch.gradient + r * row_floats;
        const float* alpha = scratch.alpha + (r + 1) * stride + 1;
        for (int x = left; x < right; x++) {
            Quad values = *reinterpret_cast<const QuadMemory*>(cells + x * kChannels);
            values[kAlpha] = alpha[x];
            Quad sums = values * *reinterpret_cast<const QuadMemory*>(gradient + x * kChannels);
            for (int c = 4; c < kChannels; c += 4)
                sums += *reinterpret_cast<const QuadMemory*>(cells + x * kChannels + c) *
                        *reinterpret_cast<const QuadMemory*>(gradient + x * kChannels + c);
            out[x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
    }

    for (int r = 0; r < tile.height; r++) {
        const float* cells = sample(state, tile) + ((tile.y0 + r) * grid.width + tile.x0) * kChannels;
        const float* gradient = scratch.gradient + (r + 1) * row_floats + kChannels;
        const float* life = scratch.life + (r + 1) * stride + 1;
        float* delta = scratch.delta + r * tile.width * kChannels;
        for (int x = 0; x < tile.width; x++) {
            const Vec mask = broadcast(life[x]);
            for (int v = 0; v < kCellVectors; v++)
                store(delta + x * kChannels + v * kLanes, load(gradient + x * kChannels + v * kLanes) * mask);
        }
        for (int x = 0; x < tile.width; x += kLanes) {
            // From the windows that this cell wins, in their row-major order.
            Vec won{};
            for (int k = 8; k >= 0; k--) {
                const int window = (r + 2 - k / 3) * stride + x + 2 - k % 3;
                const IntVec winner = *reinterpret_cast<const IntVecMemory*>(scratch.winner + window);
                won += winner == IntVec{} + k ? load(scratch.life_gradient + window) : Vec{};
            }
            const int count = min(kLanes, tile.width - x);
            for (int i = 0; i < count; i++) {
                const float u = cells[(x + i) * kChannels + kAlpha];
                float& alpha = delta[(x + i) * kChannels + kAlpha];
                alpha = u >= 0.0f && u <= 1.0f ? alpha + won[i] : 0.0f;
            }
        }
    }
}

void copy_gradient(const Tile& tile, const Scratch& scratch) {
    const int row_floats = (tile.width + 2) * kChannels;
    for (int r = 0; r < tile.height; r++)
        std::memcpy(scratch.delta + r * tile.width * kChannels, scratch.gradient + (r + 1) * row_floats + kChannels,
                    tile.width * kChannels * sizeof(float));
}

// Adds the gradients of a block's first hidden layer, before relu, to those of its cells' rows and columns.
template <class Operand>
void accumulate_context(const typename Operand::Element* deltas, const Tile& tile, int begin, int cells,
                        float* gradient) {
    constexpr int vectors = kRegisters / 4;
    constexpr int columns = vectors * kLanes;
    for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
        for (int o = 0; o < kHidden1; o += columns) {
            const auto* delta = deltas + done * kHidden1 + o;
            float* row = gradient + y * kHidden1 + o;
            float* column = gradient + (tile.height + x) * kHidden1 + o;
            Vec sums[vectors] = {};
            for (int i = 0; i < length; i++, delta += kHidden1, column += kHidden1)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) {
                    const Vec values = Operand::floats(delta + v * kLanes);
                    sums[v] += values;
                    store(column + v * kLanes, load(column + v * kLanes) + values);
                }
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) store(row + v * kLanes, load(row + v * kLanes) + sums[v]);
        }
    });
}

// From the gradient of a block's update to that of its perception, in the scratch memory, and of all parameters.
template <class Operand>
void network_backward(const BackwardTask& task, const Tile& tile, int begin, int cells, float* delta_floats,
                      WeightGradients& gradients, const Scratch& scratch) {
    const Packed<Operand>& packed = unpack<Operand>(task.packed);
    const Block<Operand> block(scratch);
    hidden_layers(packed, task.context, tile, begin, cells, scratch);
    // Sums over cells may reach further: those cells must add nothing, whatever their memory held.
    const int whole_sums = round_up(cells, Operand::cells_per_sum);
    for (int cell = cells; cell < whole_sums; cell++) {
        std::memset(delta_floats + cell * kChannels, 0, kChannels * sizeof(float));
        std::memset(block.perception + cell * kPerception, 0, kPerception * sizeof(block.perception[0]));
        std::memset(block.hidden1 + cell * kHidden1, 0, kHidden1 * sizeof(block.hidden1[0]));
        std::memset(block.hidden2 + cell * kHidden2, 0, kHidden2 * sizeof(block.hidden2[0]));
    }

    // Each layer's gradient takes the place of its output once that has been used.
    const auto* delta = Operand::convert(delta_floats, whole_sums * kChannels, scratch.update);
    const auto* inputs = Operand::template inputs_by_cells<kHidden2>(block.hidden2, whole_sums, scratch.inputs_by_cells);
    const auto* deltas = Operand::template deltas_by_cells<kChannels>(delta, whole_sums, scratch.deltas_by_cells);
    Matrix<Operand, kHidden2, kChannels>::accumulate(inputs, deltas, cells, gradients.w3);
    accumulate_bias<Operand, kChannels>(deltas, cells, gradients.b3);
    Matrix<Operand, kChannels, kHidden2>::product(
        delta, packed.w3_back, nullptr, cells, [=](int cell, int i, Vec sums) {
            auto* hidden = block.hidden2 + cell * kHidden2 + i;
            Operand::store(hidden, Operand::gate(hidden, sums));
        });

    inputs = Operand::template inputs_by_cells<kHidden1>(block.hidden1, whole_sums, scratch.inputs_by_cells);
    deltas = Operand::template deltas_by_cells<kHidden2>(block.hidden2, whole_sums, scratch.deltas_by_cells);
    Matrix<Operand, kHidden1, kHidden2>::accumulate(inputs, deltas, cells, gradients.w2);
    accumulate_bias<Operand, kHidden2>(deltas, cells, gradients.b2);
    Matrix<Operand, kHidden2, kHidden1>::product(
        block.hidden2, packed.w2_back, nullptr, cells, [=](int cell, int i, Vec sums) {
            auto* hidden = block.hidden1 + cell * kHidden1 + i;
            Operand::store(hidden, Operand::gate(hidden, sums));
        });
    if (task.context)
        accumulate_context<Operand>(block.hidden1, tile, begin, cells,
                                    task.gradient_context + tile.places_before * kHidden1);

    inputs = Operand::template inputs_by_cells<kPerception>(block.perception, whole_sums, scratch.inputs_by_cells);
    deltas = Operand::template deltas_by_cells<kHidden1>(block.hidden1, whole_sums, scratch.deltas_by_cells);
    Matrix<Operand, kPerception, kHidden1>::accumulate(inputs, deltas, cells, gradients.w1);
    accumulate_bias<Operand, kHidden1>(deltas, cells, gradients.b1);
    float* perception = scratch.perception;
    Matrix<Operand, kHidden1, kPerception>::product(
        block.hidden1, packed.w1_back, nullptr, cells,
        [=](int cell, int i, Vec sums) { store(perception + cell * kPerception + i, sums); });
}

template <class Operand>
void backward(const BackwardTask& task, const Tile& tile, WeightGradients& gradients, float* memory) {
    const Scratch scratch(tile.height, tile.width, memory);
    const int row_floats = (tile.width + 2) * kChannels;
    gather_gradient(task.gradient_to, task.tiles, tile, scratch);
    if (task.life_mask)
        unmask_gradient(task.to, tile, scratch);
    else
        copy_gradient(tile, scratch);
    read_state(task.from, task.masked, task.growth, tile, scratch);
    float* out = task.gradient_from + tile.extended_before * kChannels;
    std::memset(out, 0, extended_cells(tile) * kChannels * sizeof(float));

    const int total = tile.height * tile.width;
    for (int begin = 0; begin < total; begin += Operand::block) {
        const int cells = min(Operand::block, total - begin);
        float* delta = scratch.delta + begin * kChannels;  // what reaches u, and from there the state directly
        float* update_delta = delta;
        if (task.growth) {
            update_delta = scratch.grown;
            std::memcpy(update_delta, delta, cells * kChannels * sizeof(float));
            erase_dead(update_delta, tile, begin, cells, scratch);
        }
        if (!task.growth || anything_lives(tile, begin, cells, scratch))
            network_backward<Operand>(task, tile, begin, cells, update_delta, gradients, scratch);
        else
            std::memset(scratch.perception, 0, cells * kPerception * sizeof(float));
        for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
            perceive_back(scratch.perception + done * kPerception, delta + done * kChannels, length,
                          out + (y + 1) * row_floats + (x + 1) * kChannels, row_floats);
        });
    }
}

void read_gradient(const float* gradient, const Tile* tiles, const Tile& tile, float* planar, float* memory) {
    const Scratch scratch(tile.height, tile.width, memory);
    gather_gradient(gradient, tiles, tile, scratch);
    write_planar(scratch.gradient, tile, planar);
}

// ---------------------------------------------------------------------------------------------------------------
// The functions of this instruction set, for dispatch.cpp

template <class Operand>
constexpr PrecisionKernels precision_kernels() {
    return {sizeof(Packed<Operand>) / sizeof(float), pack<Operand>, step<Operand>, backward<Operand>,
            multiply_adds<Operand>};
}

constexpr PrecisionKernels narrowest_kernels = precision_kernels<Narrowest>();
constexpr const PrecisionKernels* bf16 = Narrowest::per_word == 2 ? &narrowest_kernels : nullptr;

#define FASTNCA_STRING(x) #x
#define FASTNCA_NAME(x) FASTNCA_STRING(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FASTNCA_NAME(FASTNCA_ISA), scratch_floats, read, read_gradient, precision_kernels<Fp32>(),
                         bf16};

}  // namespace fastnca::FASTNCA_ISA
