// What the matrix products multiply: float32, or bf16 where the instruction set has it. Sums are float32 in each.
// For kernels.cpp only, see there.
//
// A lane of a multiply-add takes words of 32 bits: one float, or two bf16 whose products are both added to the sum.
// So a product sums over pairs of channels, and a weight gradient over pairs of cells: its two factors are first laid
// out for that, by inputs_by_cells() and deltas_by_cells().
#pragma once

#include "simd.h"

namespace fastnca::FASTNCA_ISA {
namespace {

struct Fp32 {
    using Element = float;
    using Words = Vec;
    static constexpr int per_word = 1;
    static constexpr int cells_per_sum = 1;  // a weight gradient's sums take so many cells at once
    // Cells of a block, which go through all layers together: its intermediates stay in the inner caches.
    static constexpr int block = 48;

    static FASTNCA_INLINE Element convert(float x) { return x; }
    static FASTNCA_INLINE Words words(const Element* p) { return load(p); }
    static FASTNCA_INLINE Words broadcast_word(const Element* p) { return broadcast(*p); }
    static FASTNCA_INLINE Words ones() { return broadcast(1.0f); }
    static FASTNCA_INLINE Vec multiply_add(Vec sum, Words a, Words b) { return sum + a * b; }
    static FASTNCA_INLINE void store(Element* p, Vec values) { FASTNCA_ISA::store(p, values); }
    static FASTNCA_INLINE Vec floats(const Element* p) { return load(p); }
    // The gradient of relu: it passes where relu's output is not zero.
    static FASTNCA_INLINE Vec gate(const Element* relu, Vec gradient) {
        return load(relu) <= 0.0f ? Vec{} : gradient;
    }
    static const Element* convert(const float* floats, int, float*) { return floats; }
    template <int kColumns>
    static const Element* inputs_by_cells(const Element* elements, int, float*) {
        return elements;
    }
    template <int kColumns>
    static const Element* deltas_by_cells(const Element* elements, int, float*) {
        return elements;
    }
};

#if defined(__AVX512BF16__)
// How fast depends on the processor. Where vdpbf16ps has the rate of a float32 multiply-add, bf16 has twice the peak.
// An Intel Xeon of model 207 was seen to start one every two cycles instead of two per cycle: half the peak of float32.
struct Bf16 {
    using Element = uint16_t;
    using Words = IntVec;
    static constexpr int per_word = 2;
    static constexpr int cells_per_sum = 2;
    static constexpr int block = 96;

    typedef int32_t WordMemory __attribute__((aligned(2), may_alias));
    typedef int64_t HalfVec __attribute__((vector_size(32)));
    typedef int64_t HalfVecMemory __attribute__((vector_size(32), aligned(2), may_alias));
    typedef uint32_t WideVec __attribute__((vector_size(64)));
    typedef uint16_t ElementsMemory __attribute__((vector_size(32), aligned(2), may_alias));

    static Element convert(float x) {
        HalfVec rounded = (HalfVec)_mm512_cvtneps_pbh((__m512)broadcast(x));
        return Element(rounded[0]);
    }
    static FASTNCA_INLINE Words words(const Element* p) { return *reinterpret_cast<const IntVecMemory*>(p); }
    static FASTNCA_INLINE Words broadcast_word(const Element* p) {
        return IntVec{} + *reinterpret_cast<const WordMemory*>(p);
    }
    static FASTNCA_INLINE Words ones() { return IntVec{} + 0x3f803f80; }
    static FASTNCA_INLINE Vec multiply_add(Vec sum, Words a, Words b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    static FASTNCA_INLINE void store(Element* p, Vec values) {
        *reinterpret_cast<HalfVecMemory*>(p) = (HalfVec)_mm512_cvtneps_pbh((__m512)values);
    }
    static FASTNCA_INLINE Vec floats(const Element* p) {
        return (Vec)(__builtin_convertvector(*reinterpret_cast<const ElementsMemory*>(p), WideVec) << 16);
    }
    static FASTNCA_INLINE Vec gate(const Element* relu, Vec gradient) {
        const __m256i outputs = (__m256i)*reinterpret_cast<const HalfVecMemory*>(relu);
        return (Vec)_mm512_maskz_mov_ps(_mm256_test_epi16_mask(outputs, _mm256_set1_epi16(0x7fff)), (__m512)gradient);
    }
    static const Element* convert(const float* floats, int count, float* memory) {
        Element* converted = reinterpret_cast<Element*>(memory);
        for (int i = 0; i < count; i += kLanes) store(converted + i, load(floats + i));
        return converted;
    }
    // The words of two neighboring cells, from [cell][column].
    template <int kColumns>
    static FASTNCA_INLINE Words pair(const Element* cell) {
        const auto widen = [](const Element* p) {
            return __builtin_convertvector(*reinterpret_cast<const ElementsMemory*>(p), WideVec);
        };
        return (Words)(widen(cell) | widen(cell + kColumns) << 16);
    }
    // From [cell][column] to [cell / 2][column][2].
    template <int kColumns>
    static const Element* deltas_by_cells(const Element* elements, int cells, float* memory) {
        Element* out = reinterpret_cast<Element*>(memory);
        for (int cell = 0; cell < cells; cell += 2, elements += 2 * kColumns)
            for (int i = 0; i < kColumns; i += kLanes, out += 2 * kLanes)
                *reinterpret_cast<IntVecMemory*>(out) = pair<kColumns>(elements + i);
        return reinterpret_cast<const Element*>(memory);
    }
    template <int kColumns>
    static const Element* inputs_by_cells(const Element* elements, int cells, float* memory) {
        return deltas_by_cells<kColumns>(elements, cells, memory);
    }
};
#endif

}  // namespace
}  // namespace fastnca::FASTNCA_ISA
