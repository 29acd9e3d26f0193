// The C++ interface between the rollout driver and the kernels, which are compiled once per instruction set.
//
// A state is stored channels-last, [grid][n][y][x][16], and holds u: the result of a step BEFORE alpha is clamped and
// the cell is masked by the life of its neighbors. Both are applied when a state is read, so a step needs only one
// pass, and the backward pass finds the clamp's gate in the saved state instead of recomputing it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnca {

constexpr int kChannels = 16;
constexpr int kPerception = 4 * kChannels;
constexpr int kHidden1 = 128;
constexpr int kHidden2 = 64;
constexpr int kAlpha = 1;

// Parameters in the layout of 1x1 convolutions: w[out][in].
struct Weights {
    const float *w1, *b1, *w2, *b2, *w3, *b3;
};

// What every cell is told at every step: a vector for its row, [n][y][128] for each grid, and one for its column,
// [n][x][128], which both grids share. Null without context.
struct Context {
    const float* rows[2];
    const float* columns;

    explicit operator bool() const { return columns; }
};

// One accumulator of parameter gradients; the matrices are transposed, [in][out].
struct WeightGradients {
    alignas(64) float w1[kPerception * kHidden1];
    alignas(64) float w2[kHidden1 * kHidden2];
    alignas(64) float w3[kHidden2 * kChannels];
    alignas(64) float b1[kHidden1];
    alignas(64) float b2[kHidden2];
    alignas(64) float b3[kChannels];
};

// A batch of grids of one size, cut into tiles of equal size (smaller at the lower and right edge).
// The cut depends on the size alone: results do not depend on the number of threads.
struct Grid {
    int64_t height, width;
    int64_t tile_height, tile_width;
    int64_t tiles_down, tiles_across;
};

// A tile is the unit of work. Its extended form, one cell larger on every side, is what its cells read and, in the
// backward pass, what they send gradients to.
struct Tile {
    const Grid* grid;
    int which;                // 0: mel, 1: linear
    int64_t sample;
    int64_t cells_before;     // of a state: all cells before the first cell of this tile's sample
    int64_t tiles_before;     // all tiles before the first tile of this tile's sample
    int64_t extended_before;  // cells of the extended forms of all tiles before this one
    int64_t places_before;    // rows and columns of all tiles before this one
    int64_t y0, x0;
    int height, width;
};

inline int64_t extended_cells(const Tile& tile) { return int64_t(tile.height + 2) * (tile.width + 2); }

// A step reads the state `from`; `masked` tells whether clamp and life mask apply to it (not to the initial state).
struct StepTask {
    const float* packed;
    Context context;
    bool growth;  // cells in whose neighborhood nothing lives do not change
    const float* from;
    bool masked;
    float* to;
};

struct BackwardTask {
    const float* packed;
    Context context;
    bool growth;
    const Tile* tiles;
    const float* from;  // the state that the step read, as in StepTask
    bool masked;
    const float* to;  // the state that the step wrote
    bool life_mask;   // whether `to` was clamped and masked when it was read
    // Gradients of the read states: each tile holds, in its extended form, what its own cells contributed.
    const float* gradient_to;
    float* gradient_from;
    float* gradient_context;  // of each tile's rows and then of its columns, [place][128]; added to
};

// The part that depends on the operands of the matrix products. Sums, states and gradients are float32 in each.
struct PrecisionKernels {
    size_t packed_floats;
    void (*pack)(const Weights&, float* packed);
    void (*step)(const StepTask&, const Tile&, float* scratch);
    void (*backward)(const BackwardTask&, const Tile&, WeightGradients&, float* scratch);
    // Runs `rounds` rounds of independent fused multiply-adds from registers; returns the number of operations.
    double (*multiply_adds)(int64_t rounds);
};

struct Kernels {
    const char* name;
    size_t (*scratch_floats)(int height, int width);
    // Reads a state and writes the planar output [16][height][width] of the tile's sample.
    void (*read)(const float* state, bool masked, const Tile&, float* planar, float* scratch);
    // Sums the contributions to the tile's gradients and writes them planar.
    void (*read_gradient)(const float* gradient, const Tile* tiles, const Tile&, float* planar, float* scratch);
    PrecisionKernels fp32;
    const PrecisionKernels* bf16;  // null where the instruction set has no bf16 products

    const PrecisionKernels& of(bool is_bf16) const { return is_bf16 ? *bf16 : fp32; }
};

// dispatch.cpp
const Kernels& active_kernels();
// Null where the name is unknown or the processor lacks the instructions; an empty name means the best there is.
const Kernels* find_kernels(const char* name);
void activate_kernels(const Kernels&);
const char* const* kernel_names();  // null-terminated, best last

// rollout.cpp
struct Problem {
    int64_t batch;
    int64_t height[2], width[2];  // mel, linear
    int64_t num_steps;
    int64_t save_every;  // as in SavedStates
    bool life_mask;
    bool growth;
    bool bf16;  // only where the active kernels have it
    int threads;
    bool (*interrupted)();  // asked between tiles in the calling thread: whether to end early; may be null
};

// The states that a rollout saves, one after the other: those after 0, every, 2 every, ... steps, and the last one.
struct SavedStates {
    int64_t num_steps, every;

    int64_t count() const { return index(num_steps) + 1; }
    bool has(int64_t step) const { return step % every == 0 || step == num_steps; }
    // Of a saved state.
    int64_t index(int64_t step) const { return (step + every - 1) / every; }
    // The last step before this one whose state is saved.
    int64_t before(int64_t step) const { return (step - 1) / every * every; }
};

// Only where all is done do the outputs hold the result.
enum class Outcome { done, interrupted, out_of_memory };

// `states` holds the SavedStates, or is null: then rollout() saves nothing.
Outcome rollout(const Problem&, const Weights&, const Context&, const float* const initial[2], float* const final[2],
                float* states);
// `gradient_context`: of the tables of Context, rows[0], rows[1], columns.
Outcome rollout_backward(const Problem&, const Weights&, const Context&, const float* states,
                         const float* const gradient_final[2], float* const gradient_initial[2],
                         float* const gradient_weights[6], float* const gradient_context[3]);
double peak_flops(int threads, bool bf16);

}  // namespace fastnca
