// The matrix products over a block of cells, and the packed weights that they read. For kernels.cpp only, see there.
//
// Activations are laid out [cell][channel]. Forward, data gradient and weight gradient are then all the same kind of
// loop, an outer product of one broadcast word and a few vectors. A patch is the part of the result whose sums stay in
// registers during that loop.
#pragma once

#include <cstring>

#include "fastnca.h"
#include "operands.h"

namespace fastnca::FASTNCA_ISA {
namespace {

constexpr int kPatchVectors = kRegisters / 8;
constexpr int kPatchCells = 6;   // of product(): three quarters of the registers hold sums
constexpr int kPatchInputs = 4;  // of accumulate(): half of them

// Few outputs fill few vectors: the patch then has more cells, to have enough independent sums.
template <int kOut>
struct Patch {
    static constexpr int vectors = min(kOut / kLanes, kPatchVectors);
    static constexpr int cells = kPatchCells * kPatchVectors / vectors;
    static constexpr int columns = vectors * kLanes;
    static_assert(kOut % columns == 0, "patches must cover the outputs exactly");
};

// Weights for product(): panels of Patch::columns outputs, [panel][word of inputs][column][input of the word].
template <class Operand, int kIn, int kOut, class Weight>
void pack_panels(typename Operand::Element* packed, const Weight& weight) {
    constexpr int columns = Patch<kOut>::columns;
    for (int panel = 0; panel < kOut; panel += columns)
        for (int i = 0; i < kIn; i += Operand::per_word)
            for (int o = panel; o < panel + columns; o++)
                for (int k = 0; k < Operand::per_word; k++) *packed++ = Operand::convert(weight(i + k, o));
}

// The products with a matrix of kIn inputs and kOut outputs. amx.h has a specialization.
template <class Operand, int kIn, int kOut>
struct Matrix {
    using Element = typename Operand::Element;
    static constexpr int per_word = Operand::per_word;

    // emit(cell, output, sums) receives bias[o] + sum over i of in[cell][i] * weight(i, o), kLanes outputs at a time.
    // Cells are computed in whole patches: those beyond the end from leftovers, and nobody may use them.
    template <class Emit>
    static FASTNCA_INLINE void product(const Element* in, const Element* packed, const float* bias, int cells,
                                       const Emit& emit) {
        using Shape = Patch<kOut>;
        static_assert(Operand::block % Shape::cells == 0, "a block must hold the cells of whole patches");
        for (int panel = 0; panel < kOut; panel += Shape::columns, packed += kIn * Shape::columns) {
            for (int cell = 0; cell < cells; cell += Shape::cells) {
                Vec sums[Shape::cells][Shape::vectors];
#pragma GCC unroll 24
                for (int c = 0; c < Shape::cells; c++)
#pragma GCC unroll 4
                    for (int v = 0; v < Shape::vectors; v++)
                        sums[c][v] = bias ? load(bias + panel + v * kLanes) : Vec{};
                const auto* x = in + cell * kIn;
                const auto* w = packed;
#pragma GCC unroll 1
                for (int i = 0; i < kIn; i += per_word, x += per_word, w += Shape::columns * per_word) {
                    typename Operand::Words row[Shape::vectors];
#pragma GCC unroll 4
                    for (int v = 0; v < Shape::vectors; v++) row[v] = Operand::words(w + v * kLanes * per_word);
#pragma GCC unroll 24
                    for (int c = 0; c < Shape::cells; c++) {
                        const auto value = Operand::broadcast_word(x + c * kIn);
#pragma GCC unroll 4
                        for (int v = 0; v < Shape::vectors; v++)
                            sums[c][v] = Operand::multiply_add(sums[c][v], value, row[v]);
                    }
                }
#pragma GCC unroll 24
                for (int c = 0; c < Shape::cells; c++)
#pragma GCC unroll 4
                    for (int v = 0; v < Shape::vectors; v++) emit(cell + c, panel + v * kLanes, sums[c][v]);
            }
        }
    }

    // gradient[i][o] += sum over cells of in[cell][i] * delta[cell][o], laid out by inputs_by_cells() and
    // deltas_by_cells(). The sum of a block is complete before it is added: two levels of summation keep the rounding
    // error of long rollouts low.
    static void accumulate(const Element* in, const Element* delta, int cells, float* gradient) {
        constexpr int vectors = Patch<kOut>::vectors;
        constexpr int inputs = kPatchInputs * kPatchVectors / vectors;
        for (int o = 0; o < kOut; o += vectors * kLanes) {
            for (int i = 0; i < kIn; i += inputs) {
                Vec sums[inputs][vectors] = {};
                const auto* x = in + i * per_word;
                const auto* d = delta + o * per_word;
#pragma GCC unroll 1
                for (int cell = 0; cell < cells; cell += per_word, x += kIn * per_word, d += kOut * per_word) {
                    typename Operand::Words row[vectors];
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) row[v] = Operand::words(d + v * kLanes * per_word);
#pragma GCC unroll 16
                    for (int r = 0; r < inputs; r++) {
                        const auto value = Operand::broadcast_word(x + r * per_word);
#pragma GCC unroll 4
                        for (int v = 0; v < vectors; v++)
                            sums[r][v] = Operand::multiply_add(sums[r][v], value, row[v]);
                    }
                }
#pragma GCC unroll 16
                for (int r = 0; r < inputs; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) {
                        float* sum = gradient + (i + r) * kOut + o + v * kLanes;
                        store(sum, load(sum) + sums[r][v]);
                    }
            }
        }
    }
};

// gradient[o] += sum over cells of delta[cell][o], laid out by deltas_by_cells().
template <class Operand, int kOut>
void accumulate_bias(const typename Operand::Element* delta, int cells, float* gradient) {
    constexpr int vectors = Patch<kOut>::vectors;
    for (int o = 0; o < kOut; o += vectors * kLanes) {
        Vec sums[vectors] = {};
        for (int cell = 0; cell < cells; cell += Operand::per_word)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[v] = Operand::multiply_add(
                    sums[v], Operand::ones(),
                    Operand::words(delta + cell * kOut + (o + v * kLanes) * Operand::per_word));
        for (int v = 0; v < vectors; v++)
            store(gradient + o + v * kLanes, load(gradient + o + v * kLanes) + sums[v]);
    }
}

// Runs `rounds` rounds of independent multiply-adds and returns the number of operations. amx.h has a specialization.
template <class Operand>
double multiply_adds(int64_t rounds) {
    constexpr int kSums = 24;  // more than latency x throughput of any processor's units
    using Element = typename Operand::Element;
    volatile float unknown = 0.5f;
    Element elements[kLanes * Operand::per_word];
    for (Element& element : elements) element = Operand::convert(unknown);
    const auto factor = Operand::words(elements);
    Vec sums[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; i++) sums[i] = broadcast(unknown);
#pragma GCC unroll 1
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 24
        for (int i = 0; i < kSums; i++) sums[i] = Operand::multiply_add(sums[i], factor, factor);
    for (int i = 1; i < kSums; i++) sums[0] += sums[i];
    unknown = sums[0][0];
    return 2.0 * kLanes * Operand::per_word * kSums * double(rounds);
}

// The parameters as product() reads them; `back` multiplies by the transposed matrix.
template <class Operand>
struct Packed {
    using Element = typename Operand::Element;
    alignas(64) Element w1[kPerception * kHidden1];
    alignas(64) Element w2[kHidden1 * kHidden2];
    alignas(64) Element w3[kHidden2 * kChannels];
    alignas(64) Element w3_back[kHidden2 * kChannels];
    alignas(64) Element w2_back[kHidden1 * kHidden2];
    alignas(64) Element w1_back[kPerception * kHidden1];
    alignas(64) float b1[kHidden1];
    alignas(64) float b2[kHidden2];
    alignas(64) float b3[kChannels];
};

template <class Operand>
const Packed<Operand>& unpack(const float* packed) {
    return *reinterpret_cast<const Packed<Operand>*>(packed);
}

template <class Operand>
void pack(const Weights& weights, float* memory) {
    Packed<Operand>& packed = *reinterpret_cast<Packed<Operand>*>(memory);
    const float *w1 = weights.w1, *w2 = weights.w2, *w3 = weights.w3;
    pack_panels<Operand, kPerception, kHidden1>(packed.w1, [=](int i, int o) { return w1[o * kPerception + i]; });
    pack_panels<Operand, kHidden1, kHidden2>(packed.w2, [=](int i, int o) { return w2[o * kHidden1 + i]; });
    pack_panels<Operand, kHidden2, kChannels>(packed.w3, [=](int i, int o) { return w3[o * kHidden2 + i]; });
    pack_panels<Operand, kChannels, kHidden2>(packed.w3_back, [=](int o, int i) { return w3[o * kHidden2 + i]; });
    pack_panels<Operand, kHidden2, kHidden1>(packed.w2_back, [=](int o, int i) { return w2[o * kHidden1 + i]; });
    pack_panels<Operand, kHidden1, kPerception>(packed.w1_back, [=](int o, int i) { return w1[o * kPerception + i]; });
    std::memcpy(packed.b1, weights.b1, sizeof(packed.b1));
    std::memcpy(packed.b2, weights.b2, sizeof(packed.b2));
    std::memcpy(packed.b3, weights.b3, sizeof(packed.b3));
}

}  // namespace
}  // namespace fastnca::FASTNCA_ISA
