// Whole rollouts: the cut of both grids into tiles, the sequence of steps, and the memory between them.
#include "fastnca.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnca {
namespace {

// A tile's state with its margin stays in the second-level cache, and even a small grid has a few tiles to share.
constexpr int64_t kTileCells = 1024;
constexpr int64_t kTileWidth = 64;
// Fewer accumulators than tiles on large grids: each takes 70 KB.
constexpr int64_t kMaxGroups = 256;
// A thread that has less to do than this costs more to start than it saves.
constexpr int64_t kCellStepsPerThread = 512;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Large states are written once by many threads: huge pages make the first touch cheap.
void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t(1) << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) & ~(huge - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(huge - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Throws std::bad_alloc.
Buffer allocate(int64_t floats) {
    const size_t bytes = size_t(divide_up(std::max<int64_t>(floats, 1), 16)) * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    advise_huge_pages(memory, bytes);
    return Buffer(static_cast<float*>(memory));
}

Grid cut(int64_t height, int64_t width) {
    Grid grid;
    grid.height = height;
    grid.width = width;
    grid.tile_width = divide_up(width, divide_up(width, kTileWidth));
    grid.tiles_across = divide_up(width, grid.tile_width);
    grid.tile_height = divide_up(height, divide_up(height, kTileCells / grid.tile_width));
    grid.tiles_down = divide_up(height, grid.tile_height);
    return grid;
}

struct Plan {
    Grid grids[2];
    std::vector<Tile> tiles;  // grid after grid, in each sample after sample, and in each row after row
    int64_t first_tile[2];
    int64_t cells = 0, extended = 0, places = 0;

    explicit Plan(const Problem& problem) {
        for (int g = 0; g < 2; g++) {
            Grid& grid = grids[g];
            grid = cut(problem.height[g], problem.width[g]);
            first_tile[g] = num_tiles();
            for (int64_t n = 0; n < problem.batch; n++) {
                const int64_t tiles_before = int64_t(tiles.size());
                for (int64_t y = 0; y < grid.height; y += grid.tile_height)
                    for (int64_t x = 0; x < grid.width; x += grid.tile_width) {
                        Tile tile;
                        tile.grid = &grid;
                        tile.which = g;
                        tile.sample = n;
                        tile.cells_before = cells;
                        tile.tiles_before = tiles_before;
                        tile.extended_before = extended;
                        tile.places_before = places;
                        tile.y0 = y;
                        tile.x0 = x;
                        tile.height = int(std::min(grid.tile_height, grid.height - y));
                        tile.width = int(std::min(grid.tile_width, grid.width - x));
                        extended += extended_cells(tile);
                        places += tile.height + tile.width;
                        tiles.push_back(tile);
                    }
                cells += grid.height * grid.width;
            }
        }
    }

    Plan(const Plan&) = delete;

    int64_t num_tiles() const { return int64_t(tiles.size()); }
    int64_t state_floats() const { return cells * kChannels; }

    int threads(const Problem& problem, int64_t steps) const {
        const int64_t useful = std::min(num_tiles(), cells * std::max<int64_t>(steps, 1) / kCellStepsPerThread);
        return int(std::max<int64_t>(1, std::min<int64_t>(problem.threads, useful)));
    }

    template <class Pointer>
    Pointer planar(Pointer const (&grids_of_call)[2], int64_t i) const {
        const Tile& tile = tiles[i];
        return grids_of_call[tile.which] + tile.sample * kChannels * tile.grid->height * tile.grid->width;
    }

    const Tile& tile(int g, int64_t n, int64_t down, int64_t across) const {
        return tiles[first_tile[g] + (n * grids[g].tiles_down + down) * grids[g].tiles_across + across];
    }

    int64_t scratch_floats(const Kernels& kernels) const {
        size_t most = 0;
        for (const Grid& grid : grids)
            most = std::max(most, kernels.scratch_floats(int(grid.tile_height), int(grid.tile_width)));
        return int64_t(most);
    }
};

// Copies the tile's part of a planar grid [16][height][width] to cells [..][16]; `row_cells` apart are the rows.
void read_planar(const float* planar, const Tile& tile, float* cells, int64_t row_cells) {
    const Grid& grid = *tile.grid;
    for (int y = 0; y < tile.height; y++)
        for (int c = 0; c < kChannels; c++) {
            const float* in = planar + (c * grid.height + tile.y0 + y) * grid.width + tile.x0;
            float* out = cells + y * row_cells * kChannels + c;
            for (int x = 0; x < tile.width; x++) out[x * kChannels] = in[x];
        }
}

void load_planar(const Plan& plan, int64_t i, const float* const (&planar)[2], float* state) {
    const Tile& tile = plan.tiles[i];
    const int64_t first = tile.cells_before + tile.y0 * tile.grid->width + tile.x0;
    read_planar(plan.planar(planar, i), tile, state + first * kChannels, tile.grid->width);
}

void load_planar_gradient(const Plan& plan, int64_t i, const float* const (&planar)[2], float* gradient) {
    const Tile& tile = plan.tiles[i];
    float* extended = gradient + tile.extended_before * kChannels;
    std::memset(extended, 0, extended_cells(tile) * kChannels * sizeof(float));
    read_planar(plan.planar(planar, i), tile, extended + (tile.width + 2 + 1) * kChannels, tile.width + 2);
}

constexpr int64_t kGradientFloats = int64_t(sizeof(WeightGradients) / sizeof(float));

// Adds up the groups' accumulators over [begin, end) in their order, leaving the sum in the first.
void sum_groups(WeightGradients* groups, int64_t count, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        double sum = 0.0;
        for (int64_t g = 0; g < count; g++) sum += reinterpret_cast<const float*>(groups + g)[i];
        reinterpret_cast<float*>(groups)[i] = float(sum);
    }
}

// Adds up the tiles' gradients of one place, a row of one grid or a column of both, in a fixed order.
class PlaceSum {
public:
    void add(const float* gradient) {
        for (int o = 0; o < kHidden1; o++) sums_[o] += gradient[o];
    }
    void write(float* out) const {
        for (int o = 0; o < kHidden1; o++) out[o] = float(sums_[o]);
    }

private:
    double sums_[kHidden1] = {};
};

// From the tiles' gradients of their rows and columns to those of the tables, of sample n.
void sum_places(const Plan& plan, const float* gradients, int64_t n, float* const (&tables)[3]) {
    const auto of_tile = [&](int g, int64_t down, int64_t across, int64_t place) {
        return gradients + (plan.tile(g, n, down, across).places_before + place) * kHidden1;
    };
    for (int g = 0; g < 2; g++) {
        const Grid& grid = plan.grids[g];
        for (int64_t y = 0; y < grid.height; y++) {
            PlaceSum sum;
            for (int64_t across = 0; across < grid.tiles_across; across++)
                sum.add(of_tile(g, y / grid.tile_height, across, y % grid.tile_height));
            sum.write(tables[g] + (n * grid.height + y) * kHidden1);
        }
    }
    const int64_t width = plan.grids[0].width;
    for (int64_t x = 0; x < width; x++) {
        PlaceSum sum;
        for (int g = 0; g < 2; g++) {
            const Grid& grid = plan.grids[g];
            for (int64_t down = 0; down < grid.tiles_down; down++) {
                const int64_t across = x / grid.tile_width;
                const int height = plan.tile(g, n, down, across).height;
                sum.add(of_tile(g, down, across, height + x % grid.tile_width));
            }
        }
        sum.write(tables[2] + (n * width + x) * kHidden1);
    }
}

void transpose(const float* in, int rows, int columns, float* out) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) out[c * rows + r] = in[r * columns + c];
}

}  // namespace

Outcome rollout(const Problem& problem, const Weights& weights, const Context& context, const float* const initial[2],
                float* const final[2], float* states) try {
    const Kernels& kernels = active_kernels();
    const PrecisionKernels& network = kernels.of(problem.bf16);
    const Plan plan(problem);
    const SavedStates saved{problem.num_steps, problem.save_every};
    const int threads = plan.threads(problem, problem.num_steps);
    const int64_t scratch_floats = plan.scratch_floats(kernels);
    const Buffer packed = allocate(int64_t(network.packed_floats));
    const Buffer scratch = allocate(scratch_floats * threads);
    const bool all_saved = states && problem.save_every == 1;
    const Buffer unsaved = allocate(all_saved ? 0 : 2 * plan.state_floats());
    if (states) advise_huge_pages(states, size_t(saved.count() * plan.state_floats()) * sizeof(float));
    network.pack(weights, packed.get());

    const float* const inputs[2] = {initial[0], initial[1]};
    float* const outputs[2] = {final[0], final[1]};
    const auto state = [&](int64_t step) {
        return states && saved.has(step) ? states + saved.index(step) * plan.state_floats()
                                         : unsaved.get() + (step % 2) * plan.state_floats();
    };
    const auto masked = [&](int64_t step) { return problem.life_mask && step > 0; };

    const bool done = Team::run(threads, problem.interrupted, [&](Team::Member& member) {
        float* memory = scratch.get() + member.rank() * scratch_floats;
        member.for_each(plan.num_tiles(), [&](int64_t i) { load_planar(plan, i, inputs, state(0)); });
        for (int64_t s = 0; s < problem.num_steps; s++) {
            const StepTask task{packed.get(), context, problem.growth, state(s), masked(s), state(s + 1)};
            member.for_each(plan.num_tiles(), [&](int64_t i) { network.step(task, plan.tiles[i], memory); });
        }
        const int64_t last = problem.num_steps;
        member.for_each(plan.num_tiles(), [&](int64_t i) {
            kernels.read(state(last), masked(last), plan.tiles[i], plan.planar(outputs, i), memory);
        });
    });
    return done ? Outcome::done : Outcome::interrupted;
} catch (const std::bad_alloc&) {
    return Outcome::out_of_memory;
}

Outcome rollout_backward(const Problem& problem, const Weights& weights, const Context& context, const float* states,
                         const float* const gradient_final[2], float* const gradient_initial[2],
                         float* const gradient_weights[6], float* const gradient_context[3]) try {
    const Kernels& kernels = active_kernels();
    const PrecisionKernels& network = kernels.of(problem.bf16);
    const Plan plan(problem);
    const SavedStates saved{problem.num_steps, problem.save_every};
    const int threads = plan.threads(problem, 3 * problem.num_steps);
    const int64_t scratch_floats = plan.scratch_floats(kernels);
    const int64_t num_groups = std::min(plan.num_tiles(), kMaxGroups);
    const Buffer packed = allocate(int64_t(network.packed_floats));
    const Buffer scratch = allocate(scratch_floats * threads);
    const Buffer replayed = allocate((std::min(saved.every, saved.num_steps) - 1) * plan.state_floats());
    const Buffer gradients = allocate(2 * plan.extended * kChannels);
    const Buffer group_gradients = allocate(num_groups * kGradientFloats);
    const Buffer places = allocate(context ? plan.places * kHidden1 : 0);
    float* const tables[3] = {gradient_context[0], gradient_context[1], gradient_context[2]};
    WeightGradients* groups = reinterpret_cast<WeightGradients*>(group_gradients.get());
    network.pack(weights, packed.get());

    const float* const inputs[2] = {gradient_final[0], gradient_final[1]};
    float* const outputs[2] = {gradient_initial[0], gradient_initial[1]};
    const auto gradient = [&](int64_t step) { return gradients.get() + (step % 2) * plan.extended * kChannels; };
    const auto masked = [&](int64_t step) { return problem.life_mask && step > 0; };

    const bool done = Team::run(threads, problem.interrupted, [&](Team::Member& member) {
        float* memory = scratch.get() + member.rank() * scratch_floats;
        member.for_each(num_groups, [&](int64_t g) { std::memset(groups + g, 0, sizeof(WeightGradients)); });
        member.for_each(plan.num_tiles(), [&](int64_t i) {
            load_planar_gradient(plan, i, inputs, gradient(problem.num_steps));
            const Tile& tile = plan.tiles[i];
            if (context)
                std::memset(places.get() + tile.places_before * kHidden1, 0,
                            size_t(tile.height + tile.width) * kHidden1 * sizeof(float));
        });
        // From each saved state to the one before it: the states between them are computed again.
        for (int64_t end = problem.num_steps, begin; end > 0; end = begin) {
            begin = saved.before(end);
            const auto state = [&](int64_t step) -> const float* {
                return saved.has(step) ? states + saved.index(step) * plan.state_floats()
                                       : replayed.get() + (step - begin - 1) * plan.state_floats();
            };
            for (int64_t s = begin; s + 1 < end; s++) {
                const StepTask task{packed.get(), context,   problem.growth,
                                    state(s),     masked(s), const_cast<float*>(state(s + 1))};
                member.for_each(plan.num_tiles(), [&](int64_t i) { network.step(task, plan.tiles[i], memory); });
            }
            for (int64_t s = end - 1; s >= begin; s--) {
                const BackwardTask task{packed.get(),   context,  problem.growth,  plan.tiles.data(),
                                        state(s),       masked(s), state(s + 1),    masked(s + 1),
                                        gradient(s + 1), gradient(s), places.get()};
                member.for_each(num_groups, [&](int64_t g) {
                    const int64_t last = plan.num_tiles() * (g + 1) / num_groups;
                    for (int64_t i = plan.num_tiles() * g / num_groups; i < last; i++)
                        network.backward(task, plan.tiles[i], groups[g], memory);
                });
            }
        }
        member.for_each(plan.num_tiles(), [&](int64_t i) {
            kernels.read_gradient(gradient(0), plan.tiles.data(), plan.tiles[i], plan.planar(outputs, i), memory);
        });
        constexpr int64_t chunk = 1024;
        member.for_each(divide_up(kGradientFloats, chunk), [&](int64_t i) {
            sum_groups(groups, num_groups, i * chunk, std::min((i + 1) * chunk, kGradientFloats));
        });
        if (context)
            member.for_each(problem.batch, [&](int64_t n) { sum_places(plan, places.get(), n, tables); });
    });
    if (!done) return Outcome::interrupted;
    transpose(groups->w1, kPerception, kHidden1, gradient_weights[0]);
    std::memcpy(gradient_weights[1], groups->b1, sizeof(groups->b1));
    transpose(groups->w2, kHidden1, kHidden2, gradient_weights[2]);
    std::memcpy(gradient_weights[3], groups->b2, sizeof(groups->b2));
    transpose(groups->w3, kHidden2, kChannels, gradient_weights[4]);
    std::memcpy(gradient_weights[5], groups->b3, sizeof(groups->b3));
    return Outcome::done;
} catch (const std::bad_alloc&) {
    return Outcome::out_of_memory;
}

double peak_flops(int threads, bool bf16) {
    using Clock = std::chrono::steady_clock;
    const PrecisionKernels& kernels = active_kernels().of(bf16);
    std::vector<double> rates(threads, 0.0);
    Team::run(threads, nullptr, [&](Team::Member& member) {
        const auto begin = Clock::now();
        double operations = 0.0, seconds = 0.0;
        while (seconds < 0.1) {
            operations += kernels.multiply_adds(10000);
            seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        rates[member.rank()] = operations / seconds;
    });
    double sum = 0.0;
    for (double rate : rates) sum += rate;
    return sum;
}

}  // namespace fastnca
