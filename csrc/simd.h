// Vectors of floats, as wide as the instruction set has them: the compiler's predefined macros tell which set it is.
// For kernels.cpp only, see there.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTNCA_INLINE inline __attribute__((always_inline))

namespace fastnca::FASTNCA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float Quad __attribute__((vector_size(16)));

// As in memory: unaligned, and allowed to alias floats.
typedef float VecMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVecMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float QuadMemory __attribute__((vector_size(16), aligned(4), may_alias));

FASTNCA_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecMemory*>(p); }
FASTNCA_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecMemory*>(p) = v; }
FASTNCA_INLINE Vec broadcast(float x) { return x - Vec{}; }

// The standard library's functions of these names must not be instantiated here.
FASTNCA_INLINE constexpr int min(int a, int b) { return a < b ? a : b; }
FASTNCA_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTNCA_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// NaN passes through, as in PyTorch. (Compilers make two instructions of the ternary operator; the processor's maximum
// is its second operand where one of them is NaN.)
#if defined(__AVX512F__)
FASTNCA_INLINE Vec relu(Vec x) { return (Vec)_mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), (__m512)x); }
#elif defined(__AVX2__)
FASTNCA_INLINE Vec relu(Vec x) { return (Vec)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x); }
#else
FASTNCA_INLINE Vec relu(Vec x) { return 0.0f > x ? Vec{} : x; }
#endif
FASTNCA_INLINE float clamp01(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }

}  // namespace
}  // namespace fastnca::FASTNCA_ISA
