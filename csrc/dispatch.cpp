// The choice among the kernels of the compiled instruction sets, by what the processor (and system) supports.
#include "fastnca.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastnca {

#if defined(__x86_64__)
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx_bf16 { extern const Kernels kernels; }

namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*supported)();
};

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux lets a process use the registers of AMX when it asks.
bool has_amx_bf16() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    unsigned eax, ebx, ecx, edx;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & amx_bf16) &&
           (edx & amx_tile) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

const Candidate candidates[] = {
    {&baseline::kernels, [] { return true; }},
    {&avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {&avx512::kernels, has_avx512},
    {&avx512_bf16::kernels, has_avx512_bf16},
    {&amx_bf16::kernels, has_amx_bf16},
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
