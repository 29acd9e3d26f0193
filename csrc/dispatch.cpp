// The choice among the kernels of the compiled instruction sets, by what the processor (and system) supports.
#include "fastnca.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastnca {

#if defined(__x86_64__)
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*supported)();
};

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Candidate candidates[] = {
    {&baseline::kernels, [] { return true; }},
    {&avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {&avx512::kernels, has_avx512},
    {&avx512_bf16::kernels, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
};
#else
namespace baseline { extern const Kernels kernels; }

namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*supported)();
};

const Candidate candidates[] = {{&baseline::kernels, [] { return true; }}};
#endif

constexpr int kCandidates = sizeof(candidates) / sizeof(candidates[0]);
std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels* find_kernels(const char* name) {
    const Kernels* found = nullptr;
    for (const Candidate& candidate : candidates)
        if (candidate.supported() && (!*name || !std::strcmp(name, candidate.kernels->name)))
            found = candidate.kernels;
    return found;
}

const Kernels& active_kernels() { return *active.load(std::memory_order_relaxed); }

void activate_kernels(const Kernels& kernels) { active.store(&kernels, std::memory_order_relaxed); }

const char* const* kernel_names() {
    static const char* names[kCandidates + 1];
    for (int i = 0; i < kCandidates; i++) names[i] = candidates[i].kernels->name;
    return names;
}

}  // namespace fastnca
