// Runs the kernels without Python, for the sanitizers (tests/sanitize/run.sh): every instruction set, odd sizes,
// several threads, several callers, calls that are interrupted, and tiles beyond the 2^31st element. Exits with an error where a result depends on
// the number of threads, or a far tile differs from the same tile near the origin.
//
// Includes rollout.cpp to reach the cut of a grid into tiles.
#include "../../csrc/rollout.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>

namespace {

using namespace fastnca;

int failures = 0;

void check(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    failures++;
}

std::vector<float> random_floats(size_t count, unsigned seed, float scale = 1.0f) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> distribution(-scale, scale);
    std::vector<float> values(count);
    for (float& value : values) value = distribution(generator);
    return values;
}

struct Parameters {
    std::vector<float> values[6] = {random_floats(kHidden1 * kPerception, 1, 0.2f), random_floats(kHidden1, 2, 0.2f),
                                    random_floats(kHidden2 * kHidden1, 3, 0.2f),    random_floats(kHidden2, 4, 0.2f),
                                    random_floats(kChannels * kHidden2, 5, 0.2f),   random_floats(kChannels, 6, 0.2f)};

    Weights weights() const {
        return {values[0].data(), values[1].data(), values[2].data(),
                values[3].data(), values[4].data(), values[5].data()};
    }
};

struct Size {
    int64_t batch, mel_height, mel_width, linear_height, linear_width;
};

// The final grids, the gradients of the initial ones, of the parameters and of the context, one after the other.
// told: with context and growth; both grids have the same width then.
std::vector<float> differentiate(const Size& size, int64_t num_steps, int64_t save_every, bool life_mask, bool told,
                                 bool bf16, int threads, const Parameters& parameters) {
    Problem problem{};
    problem.batch = size.batch;
    problem.height[0] = size.mel_height, problem.width[0] = size.mel_width;
    problem.height[1] = size.linear_height, problem.width[1] = size.linear_width;
    problem.num_steps = num_steps;
    problem.save_every = save_every;
    problem.life_mask = life_mask;
    problem.growth = told;
    problem.bf16 = bf16;
    problem.threads = threads;

    std::vector<float> tables[3], gradient_tables[3];
    const int64_t lengths[3] = {size.mel_height, size.linear_height, size.mel_width};
    for (int i = 0; told && i < 3; i++) {
        tables[i] = random_floats(size_t(size.batch * lengths[i] * kHidden1), 12 + unsigned(i));
        gradient_tables[i].resize(tables[i].size());
    }
    const Context context = told ? Context{{tables[0].data(), tables[1].data()}, tables[2].data()} : Context{};
    float* const context_gradients[3] = {gradient_tables[0].data(), gradient_tables[1].data(),
                                         gradient_tables[2].data()};
    const size_t floats[2] = {size_t(size.batch * kChannels * size.mel_height * size.mel_width),
                              size_t(size.batch * kChannels * size.linear_height * size.linear_width)};
    const std::vector<float> initial[2] = {random_floats(floats[0], 7), random_floats(floats[1], 8)};
    const std::vector<float> gradient[2] = {random_floats(floats[0], 9), random_floats(floats[1], 10)};
    std::vector<float> final[2], gradient_initial[2], gradient_weights[6];
    for (int g = 0; g < 2; g++) final[g].resize(floats[g]), gradient_initial[g].resize(floats[g]);
    for (int i = 0; i < 6; i++) gradient_weights[i].resize(parameters.values[i].size());
    std::vector<float> states(SavedStates{num_steps, save_every}.count() * (floats[0] + floats[1]));

    const float* const inputs[2] = {initial[0].data(), initial[1].data()};
    float* const outputs[2] = {final[0].data(), final[1].data()};
    check(rollout(problem, parameters.weights(), context, inputs, outputs, states.data()) == Outcome::done, "rollout");
    std::vector<float> unsaved[2] = {std::vector<float>(floats[0]), std::vector<float>(floats[1])};
    float* const unsaved_outputs[2] = {unsaved[0].data(), unsaved[1].data()};
    check(rollout(problem, parameters.weights(), context, inputs, unsaved_outputs, nullptr) == Outcome::done,
          "rollout without saved states");
    for (int g = 0; g < 2; g++)
        check(!std::memcmp(final[g].data(), unsaved[g].data(), floats[g] * sizeof(float)),
              "saving states changes no result");

    const float* const gradients[2] = {gradient[0].data(), gradient[1].data()};
    float* const input_gradients[2] = {gradient_initial[0].data(), gradient_initial[1].data()};
    float* const weight_gradients[6] = {gradient_weights[0].data(), gradient_weights[1].data(),
                                        gradient_weights[2].data(), gradient_weights[3].data(),
                                        gradient_weights[4].data(), gradient_weights[5].data()};
    check(rollout_backward(problem, parameters.weights(), context, states.data(), gradients, input_gradients,
                           weight_gradients, context_gradients) == Outcome::done,
          "rollout_backward");

    std::vector<float> all;
    for (const auto& part : final) all.insert(all.end(), part.begin(), part.end());
    for (const auto& part : gradient_initial) all.insert(all.end(), part.begin(), part.end());
    for (const auto& part : gradient_weights) all.insert(all.end(), part.begin(), part.end());
    for (const auto& part : gradient_tables) all.insert(all.end(), part.begin(), part.end());
    return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

void test_rollouts(const Parameters& parameters, bool bf16) {
    const Size sizes[] = {{1, 1, 1, 1, 7}, {2, 5, 3, 7, 49}, {1, 1, 66, 33, 64}, {2, 3, 67, 19, 67}};
    for (const Size& size : sizes)
        for (const bool life_mask : {true, false})
            for (const bool told : {false, true}) {
                if (told && !(life_mask && size.mel_width == size.linear_width)) continue;
                const auto alone = differentiate(size, 3, 1, life_mask, told, bf16, 1, parameters);
                check(same_bits(alone, differentiate(size, 3, 2, life_mask, told, bf16, 3, parameters)),
                      std::string(active_kernels().name) + ": neither threads nor replayed steps change a result");
            }
}

void test_several_callers(const Parameters& parameters, bool bf16) {
    const Size size{1, 5, 30, 40, 30};
    const auto expected = differentiate(size, 2, 1, true, true, bf16, 2, parameters);
    std::vector<float> results[3];
    std::vector<std::thread> callers;
    for (auto& result : results)
        callers.emplace_back([&] { result = differentiate(size, 2, 1, true, true, bf16, 2, parameters); });
    for (std::thread& caller : callers) caller.join();
    for (const auto& result : results) check(same_bits(result, expected), "calls at the same time do not meet");
}

// Calls that would last far longer than it takes to be asked.
void test_interrupted(const Parameters& parameters) {
    const int64_t size = 66, cells = 2 * size * size;
    Problem problem{1, {size, size}, {size, size}, 10000, 100, true, false, false, 3, [] { return true; }};
    std::vector<float> from[2], to[2], gradient_weights[6];
    for (auto& grid : from) grid.resize(cells / 2 * kChannels);
    for (auto& grid : to) grid.resize(cells / 2 * kChannels);
    for (int i = 0; i < 6; i++) gradient_weights[i].resize(parameters.values[i].size());
    const float* const inputs[2] = {from[0].data(), from[1].data()};
    float* const outputs[2] = {to[0].data(), to[1].data()};
    check(rollout(problem, parameters.weights(), {}, inputs, outputs, nullptr) == Outcome::interrupted,
          "an interrupted rollout ends early");

    const std::vector<float> states(SavedStates{problem.num_steps, problem.save_every}.count() * cells * kChannels);
    float* const weight_gradients[6] = {gradient_weights[0].data(), gradient_weights[1].data(),
                                        gradient_weights[2].data(), gradient_weights[3].data(),
                                        gradient_weights[4].data(), gradient_weights[5].data()};
    float* const context_gradients[3] = {};
    check(rollout_backward(problem, parameters.weights(), {}, states.data(), inputs, outputs, weight_gradients,
                           context_gradients) == Outcome::interrupted,
          "an interrupted rollout_backward ends early");
}

#if defined(FASTNCA_TEST_FAR_TILES)

// Address space that costs memory only where it is touched.
struct Sparse {
    float* floats;
    size_t bytes;

    explicit Sparse(int64_t count) : bytes(size_t(count) * sizeof(float)) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("mmap");
            std::exit(1);
        }
        madvise(memory, bytes, MADV_NOHUGEPAGE);
        floats = static_cast<float*>(memory);
    }
    Sparse(const Sparse&) = delete;
    ~Sparse() { munmap(floats, bytes); }
};

// All that a step and its gradient do with one tile: from planar grids to planar grids.
std::vector<float> run_tile(const Plan& plan, int64_t index, const Parameters& parameters) {
    const Kernels& kernels = active_kernels();
    const PrecisionKernels& network = kernels.fp32;
    const Tile& tile = plan.tiles[index];
    const Grid& grid = *tile.grid;
    const int64_t sample_cells = grid.height * grid.width;
    const int64_t samples = tile.sample + 1;
    const Sparse planar(samples * sample_cells * kChannels), result(samples * sample_cells * kChannels);
    const Sparse from(plan.state_floats()), to(plan.state_floats());
    const Sparse gradient_to(plan.extended * kChannels), gradient_from(plan.extended * kChannels);
    std::vector<float> values = random_floats(size_t(kChannels) * tile.height * tile.width, 11);
    for (int i = 0; i < tile.height * tile.width; i++) {
        float& alpha = values[kAlpha * tile.height * tile.width + i];
        alpha = 0.1f + std::abs(alpha);
    }
    std::vector<float> packed(network.packed_floats + 16), scratch(size_t(plan.scratch_floats(kernels)) + 16);
    const auto aligned = [](std::vector<float>& memory) {
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
    };
    network.pack(parameters.weights(), aligned(packed));

    const auto place = [&](int c, int y, int x) {
        return (tile.sample * kChannels + c) * sample_cells + (tile.y0 + y) * grid.width + tile.x0 + x;
    };
    const auto copy = [&](auto&& body) {
        size_t i = 0;
        for (int c = 0; c < kChannels; c++)
            for (int y = 0; y < tile.height; y++)
                for (int x = 0; x < tile.width; x++) body(place(c, y, x), i++);
    };
    // The other grid is not touched: the tile is of one.
    float* inputs[2] = {planar.floats, planar.floats};
    float* outputs[2] = {result.floats, result.floats};
    const float* const constants[2] = {planar.floats, planar.floats};
    std::vector<float> all;
    const auto collect = [&] { copy([&](int64_t at, size_t) { all.push_back(result.floats[at]); }); };

    copy([&](int64_t at, size_t i) { inputs[0][at] = values[i]; });
    load_planar(plan, index, constants, from.floats);
    network.step(StepTask{aligned(packed), {}, false, from.floats, true, to.floats}, tile, aligned(scratch));
    kernels.read(to.floats, true, tile, plan.planar(outputs, index), aligned(scratch));
    collect();

    load_planar_gradient(plan, index, constants, gradient_to.floats);
    auto gradients = std::make_unique<WeightGradients>();
    std::memset(gradients.get(), 0, sizeof(WeightGradients));
    network.backward(BackwardTask{aligned(packed), {}, false, plan.tiles.data(), from.floats, true, from.floats, true,
                                  gradient_to.floats, gradient_from.floats, nullptr},
                     tile, *gradients, aligned(scratch));
    kernels.read_gradient(gradient_from.floats, plan.tiles.data(), tile, plan.planar(outputs, index), aligned(scratch));
    collect();
    const float* sums = reinterpret_cast<const float*>(gradients.get());
    all.insert(all.end(), sums, sums + kGradientFloats);
    return all;
}

Problem one_grid(int64_t batch, int64_t height, int64_t width) {
    Problem problem{};
    problem.batch = batch;
    problem.height[0] = problem.width[0] = 1;
    problem.height[1] = height;
    problem.width[1] = width;
    return problem;
}

// The last tile of a grid, where every index is largest, against the only tile of a grid of the tile's size.
void test_far_tile(const char* what, const Problem& far, const Parameters& parameters) {
    const Plan plan(far);
    const int64_t last = plan.num_tiles() - 1;
    const Tile& tile = plan.tiles[last];
    check(plan.state_floats() > (int64_t(1) << 31), "the far tile is far");
    const Problem near = one_grid(1, tile.height, tile.width);
    const Plan small(near);
    check(small.num_tiles() == 2 && small.tiles[1].height == tile.height && small.tiles[1].width == tile.width,
          "the near grid is one tile");
    // Around the far tile all cells are zero, around the near one there are none. That differs for the life mask alone,
    // whose maximum then starts from 0 or from -inf: not for cells whose own alpha is positive.
    check(same_bits(run_tile(plan, last, parameters), run_tile(small, 1, parameters)),
          std::string(active_kernels().name) + ": " + what + " gives what the same tile gives near the origin");
}

void test_far_tiles(const Parameters& parameters) {
    const int64_t cells = (int64_t(1) << 31) / kChannels;
    test_far_tile("the end of a wide grid", one_grid(1, 17, cells / 16), parameters);
    test_far_tile("the end of a high grid", one_grid(1, cells / 16, 17), parameters);
    test_far_tile("the end of a large batch", one_grid(cells / (20 * 30) + 1, 20, 30), parameters);
}

#endif

}  // namespace

int main() {
    const Parameters parameters;
    for (const char* const* name = kernel_names(); *name; name++) {
        const Kernels* kernels = find_kernels(*name);
        if (!kernels) {
            std::printf("%s: this processor cannot run it\n", *name);
            continue;
        }
        activate_kernels(*kernels);
        for (const bool bf16 : {false, true}) {
            if (bf16 && !kernels->bf16) continue;
            test_rollouts(parameters, bf16);
            test_several_callers(parameters, bf16);
        }
        test_interrupted(parameters);
#if defined(FASTNCA_TEST_FAR_TILES)
        test_far_tiles(parameters);
#endif
        std::printf("%s: %d failures\n", *name, failures);
    }
    return failures != 0;
}
