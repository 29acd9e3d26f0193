// The step of the automaton and its gradient for one tile. Compiled once per instruction set: FASTNCA_ISA names the
// namespace, and the compiler's predefined macros tell the vector width. Only this file gets instruction set flags,
// so it must not instantiate anything of the standard library that another object could share.
//
// Everything between two states is laid out [cell][channel]. Forward, data gradient and weight gradient are then all
// the same kind of loop, an outer product of one broadcast value and a few vectors, and nothing is ever transposed.
#include "fastnca.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // GCC's name and Clang's
#define FASTNCA_TILES
#endif

namespace fastnca {
namespace FASTNCA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileCells = 6, kTileVectors = 4;    // 24 of 32 registers accumulate
constexpr int kGradRows = 4, kGradVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileCells = 6, kTileVectors = 2;    // 12 of 16 registers
constexpr int kGradRows = 4, kGradVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileCells = 6, kTileVectors = 4;
constexpr int kGradRows = 4, kGradVectors = 4;
#else
constexpr int kLanes = 4;
constexpr int kTileCells = 6, kTileVectors = 2;
constexpr int kGradRows = 4, kGradVectors = 2;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float Quad __attribute__((vector_size(16)));

// As in memory: unaligned, and allowed to alias floats.
typedef float VecMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVecMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float QuadMemory __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int kCellVectors = kChannels / kLanes;
constexpr float kInfinity = __builtin_inff();

#define FASTNCA_INLINE inline __attribute__((always_inline))

FASTNCA_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecMemory*>(p); }
FASTNCA_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecMemory*>(p) = v; }
FASTNCA_INLINE Vec broadcast(float x) { return x - Vec{}; }
FASTNCA_INLINE constexpr int min(int a, int b) { return a < b ? a : b; }
FASTNCA_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTNCA_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// NaN passes through, as in PyTorch. (Compilers make two instructions of the ternary operator; max returns its second
// operand where one is NaN.)
#if defined(__AVX512F__)
FASTNCA_INLINE Vec relu(Vec x) { return (Vec)_mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), (__m512)x); }
#elif defined(__AVX2__)
FASTNCA_INLINE Vec relu(Vec x) { return (Vec)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x); }
#else
FASTNCA_INLINE Vec relu(Vec x) { return 0.0f > x ? Vec{} : x; }
#endif
FASTNCA_INLINE float clamp01(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }

// ---------------------------------------------------------------------------------------------------------------
// Operands of the matrix products

// A lane of a multiply-add takes words of 32 bits: one float, or two bf16 whose products are both added to the sum.
// So a product sums over pairs of channels, and a weight gradient over pairs of cells; inputs_by_cells() and
// deltas_by_cells() lay its two factors out.
struct Fp32 {
    using Element = float;
    using Words = Vec;
    static constexpr int per_word = 1;
    static constexpr int cells_per_sum = 1;  // a weight gradient's sums take so many cells at once
    // Cells of a block: its intermediates stay in the inner caches. A multiple of every tile height, so that a block
    // of any number of cells can be computed in whole tiles (the cells beyond the end are computed from leftovers and
    // never used).
    static constexpr int block = 48;

    static FASTNCA_INLINE Element convert(float x) { return x; }
    static FASTNCA_INLINE Words words(const Element* p) { return load(p); }
    static FASTNCA_INLINE Words broadcast_word(const Element* p) { return broadcast(*p); }
    static FASTNCA_INLINE Words ones() { return broadcast(1.0f); }
    static FASTNCA_INLINE Vec multiply_add(Vec sum, Words a, Words b) { return sum + a * b; }
    static FASTNCA_INLINE void store(Element* p, Vec values) { FASTNCA_ISA::store(p, values); }
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
// The tile registers of AMX have sixteen times that peak.
struct Bf16 {
    using Element = uint16_t;
    using Words = IntVec;
    static constexpr int per_word = 2;
#if defined(FASTNCA_TILES)
    static constexpr int block = 256;
    static constexpr int cells_per_sum = 32;
#else
    static constexpr int block = 96;
    static constexpr int cells_per_sum = 2;
#endif

    typedef int32_t WordMemory __attribute__((aligned(2), may_alias));
    typedef int64_t HalfVec __attribute__((vector_size(32)));
    typedef int64_t HalfVecMemory __attribute__((vector_size(32), aligned(2), may_alias));

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
    static FASTNCA_INLINE Vec gate(const Element* relu, Vec gradient) {
        const __m256i outputs = (__m256i)*reinterpret_cast<const HalfVecMemory*>(relu);
        return (Vec)_mm512_maskz_mov_ps(_mm256_test_epi16_mask(outputs, _mm256_set1_epi16(0x7fff)), (__m512)gradient);
    }
    static const Element* convert(const float* floats, int count, float* memory) {
        Element* converted = reinterpret_cast<Element*>(memory);
        for (int i = 0; i < count; i += kLanes) store(converted + i, load(floats + i));
        return converted;
    }
    // The words of two neighbouring cells, from [cell][column].
    template <int kColumns>
    static FASTNCA_INLINE Words pair(const Element* cell) {
        typedef uint32_t WideVec __attribute__((vector_size(64)));
        typedef uint16_t ElementsMemory __attribute__((vector_size(32), aligned(2), may_alias));
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
#if defined(FASTNCA_TILES)
    // From [cell][column] to [column][block].
    template <int kColumns>
    static const Element* inputs_by_cells(const Element* elements, int cells, float* memory) {
        Element* out = reinterpret_cast<Element*>(memory);
        for (int cell = 0; cell < cells; cell += 2 * kLanes)
            for (int i = 0; i < kColumns; i += kLanes) {
                Words words[kLanes];
#pragma GCC unroll 16
                for (int k = 0; k < kLanes; k++)
                    words[k] = pair<kColumns>(elements + (cell + 2 * k) * kColumns + i);
                transpose(words);
#pragma GCC unroll 16
                for (int k = 0; k < kLanes; k++)
                    *reinterpret_cast<IntVecMemory*>(out + (i + k) * block + cell) = words[k];
            }
        return reinterpret_cast<const Element*>(memory);
    }
    static FASTNCA_INLINE void transpose(Words (&rows)[kLanes]) {
        exchange<8>(rows);
        exchange<4>(rows);
        exchange<2>(rows);
        exchange<1>(rows);
    }
    // In each block of 2 n rows and columns, exchanges the upper right and the lower left quarter.
    template <int n>
    static FASTNCA_INLINE void exchange(Words (&rows)[kLanes]) {
        constexpr auto upper = [](int i) { return i & n ? kLanes + i - n : i; };
        constexpr auto lower = [](int i) { return i & n ? kLanes + i : i + n; };
#define FASTNCA_LANES(at) \
    at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; k++) {
            if (k & n) continue;
            const Words a = rows[k], b = rows[k + n];
            rows[k] = __builtin_shufflevector(a, b, FASTNCA_LANES(upper));
            rows[k + n] = __builtin_shufflevector(a, b, FASTNCA_LANES(lower));
        }
    }
#else
    template <int kColumns>
    static const Element* inputs_by_cells(const Element* elements, int cells, float* memory) {
        return deltas_by_cells<kColumns>(elements, cells, memory);
    }
#endif
};
#endif

// ---------------------------------------------------------------------------------------------------------------
// Matrix products over a block of cells

// Sixteen outputs fill few vectors: a tall tile then has enough independent sums.
template <int kOut>
struct TileShape {
    static constexpr int vectors = min(kOut / kLanes, kTileVectors);
    static constexpr int cells = vectors == kTileVectors ? kTileCells : kTileCells * kTileVectors / vectors;
    static constexpr int columns = vectors * kLanes;
    static_assert(kOut % columns == 0 && Fp32::block % cells == 0, "tiles must cover a block exactly");
};

// Weights for product(): panels of TileShape::columns outputs, [panel][word of inputs][column][input of the word].
template <class Operand, int kIn, int kOut, class Weight>
void pack_panels(typename Operand::Element* packed, const Weight& weight) {
    constexpr int columns = TileShape<kOut>::columns;
    for (int panel = 0; panel < kOut; panel += columns)
        for (int i = 0; i < kIn; i += Operand::per_word)
            for (int o = panel; o < panel + columns; o++)
                for (int k = 0; k < Operand::per_word; k++) *packed++ = Operand::convert(weight(i + k, o));
}

#if defined(FASTNCA_TILES)
// GCC does not see that tile instructions read memory: what was stored there before must not be delayed.
FASTNCA_INLINE void finish_stores(const void* to) { __asm__ volatile("" : : "r"(to) : "memory"); }

// Tile registers for products over words of 2 x bf16: 0...3 accumulate, 4 and 5 hold the left operand, 6 and 7 the right.
class TileRegisters {
public:
    explicit TileRegisters(int words) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        configuration.row_bytes[4] = configuration.row_bytes[5] = uint16_t(4 * words);
        configuration.rows[6] = configuration.rows[7] = uint8_t(words);
        finish_stores(&configuration);
        _tile_loadconfig(&configuration);
    }
    ~TileRegisters() { _tile_release(); }
};

constexpr int kTileSide = 16;

// As product(): two tiles of cells by two of outputs at a time.
template <int kIn, int kOut, class Emit>
FASTNCA_INLINE void tile_product(const uint16_t* in, const uint16_t* packed, const float* bias, int cells,
                                 const Emit& emit) {
    constexpr int columns = TileShape<kOut>::columns;
    constexpr int across = min(columns / kTileSide, 2);
    constexpr int words = min(kIn / 2, kTileSide);
    alignas(64) float sums[2][2][kTileSide][kTileSide];
    const TileRegisters registers(words);
    finish_stores(in);
    for (int panel = 0; panel < kOut; panel += columns, packed += kIn * columns)
        for (int cell = 0; cell < cells; cell += 2 * kTileSide)
            for (int o = 0; o < columns; o += across * kTileSide) {
                if (bias) {
                    _tile_loadd(0, bias + panel + o, 0);
                    _tile_loadd(1, bias + panel + o, 0);
                    if (across == 2) {
                        _tile_loadd(2, bias + panel + o + kTileSide, 0);
                        _tile_loadd(3, bias + panel + o + kTileSide, 0);
                    }
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
#pragma GCC unroll 4
                for (int i = 0; i < kIn; i += 2 * words) {
                    const uint16_t* x = in + cell * kIn + i;
                    const uint16_t* w = packed + i * columns + 2 * o;
                    _tile_loadd(4, x, kIn * 2);
                    _tile_loadd(5, x + kTileSide * kIn, kIn * 2);
                    _tile_loadd(6, w, columns * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 5, 6);
                    if (across == 2) {
                        _tile_loadd(7, w + 2 * kTileSide, columns * 4);
                        _tile_dpbf16ps(2, 4, 7);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, sums[0][0], kTileSide * 4);
                _tile_stored(1, sums[0][1], kTileSide * 4);
                if (across == 2) {
                    _tile_stored(2, sums[1][0], kTileSide * 4);
                    _tile_stored(3, sums[1][1], kTileSide * 4);
                }
                for (int k = 0; k < across; k++)
                    for (int c = 0; c < 2 * kTileSide; c++)
                        emit(cell + c, panel + o + k * kTileSide, load(&sums[k][0][0][0] + c * kTileSide));
            }
}

// As accumulate(), from inputs laid out [input][block]. The cells of a block are summed after what was there.
template <int kIn, int kOut>
void tile_accumulate(const uint16_t* in, const uint16_t* delta, int cells, float* gradient) {
    constexpr int across = min(kOut / kTileSide, 2);
    const TileRegisters registers(kTileSide);
    finish_stores(in);
    for (int i = 0; i < kIn; i += 2 * kTileSide)
        for (int o = 0; o < kOut; o += across * kTileSide) {
            float* sum = gradient + i * kOut + o;
            _tile_loadd(0, sum, kOut * 4);
            _tile_loadd(1, sum + kTileSide * kOut, kOut * 4);
            if (across == 2) {
                _tile_loadd(2, sum + kTileSide, kOut * 4);
                _tile_loadd(3, sum + kTileSide * kOut + kTileSide, kOut * 4);
            }
            for (int cell = 0; cell < cells; cell += Bf16::cells_per_sum) {
                const uint16_t* x = in + i * Bf16::block + cell;
                const uint16_t* d = delta + cell * kOut + 2 * o;
                _tile_loadd(4, x, Bf16::block * 2);
                _tile_loadd(5, x + kTileSide * Bf16::block, Bf16::block * 2);
                _tile_loadd(6, d, kOut * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
                if (across == 2) {
                    _tile_loadd(7, d + 2 * kTileSide, kOut * 4);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, sum, kOut * 4);
            _tile_stored(1, sum + kTileSide * kOut, kOut * 4);
            if (across == 2) {
                _tile_stored(2, sum + kTileSide, kOut * 4);
                _tile_stored(3, sum + kTileSide * kOut + kTileSide, kOut * 4);
            }
        }
}
#endif

// emit(cell, output, sums) receives bias[o] + sum over i of in[cell][i] * weight(i, o), kLanes outputs at a time.
template <class Operand, int kIn, int kOut, class Emit>
FASTNCA_INLINE void product(const typename Operand::Element* in, const typename Operand::Element* packed,
                            const float* bias, int cells, const Emit& emit) {
#if defined(FASTNCA_TILES)
    if constexpr (Operand::per_word == 2) return tile_product<kIn, kOut>(in, packed, bias, cells, emit);
#endif
    using Shape = TileShape<kOut>;
    constexpr int per_word = Operand::per_word;
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
// deltas_by_cells(). The sum of a block is complete before it is added: two levels of summation keep the rounding error
// of long rollouts low.
template <class Operand, int kIn, int kOut>
void accumulate(const typename Operand::Element* in, const typename Operand::Element* delta, int cells,
                float* gradient) {
#if defined(FASTNCA_TILES)
    if constexpr (Operand::per_word == 2) return tile_accumulate<kIn, kOut>(in, delta, cells, gradient);
#endif
    constexpr int per_word = Operand::per_word;
    constexpr int vectors = min(kOut / kLanes, kGradVectors);
    constexpr int rows = kGradRows * kGradVectors / vectors;
    for (int o = 0; o < kOut; o += vectors * kLanes) {
        for (int i = 0; i < kIn; i += rows) {
            Vec sums[rows][vectors] = {};
            const auto* x = in + i * per_word;
            const auto* d = delta + o * per_word;
#pragma GCC unroll 1
            for (int cell = 0; cell < cells; cell += per_word, x += kIn * per_word, d += kOut * per_word) {
                typename Operand::Words column[vectors];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) column[v] = Operand::words(d + v * kLanes * per_word);
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    const auto value = Operand::broadcast_word(x + r * per_word);
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++)
                        sums[r][v] = Operand::multiply_add(sums[r][v], value, column[v]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    float* sum = gradient + (i + r) * kOut + o + v * kLanes;
                    store(sum, load(sum) + sums[r][v]);
                }
        }
    }
}

template <class Operand, int kOut>
void accumulate_bias(const typename Operand::Element* delta, int cells, float* gradient) {
    constexpr int vectors = min(kOut / kLanes, kGradVectors);
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

// `back` multiplies by the transposed matrix.
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

// ---------------------------------------------------------------------------------------------------------------
// Scratch memory of a thread

#if defined(__AVX512BF16__)
constexpr int kMaxBlock = Bf16::block;
#else
constexpr int kMaxBlock = Fp32::block;
#endif

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
    float* inputs_by_cells;  // [kMaxBlock][128]
    float* deltas_by_cells;  // [kMaxBlock][128]
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
        for (int x = 0; x < scratch.stride; x++) row[x] = -kInfinity;
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

// The state as the step sees it, extended by one cell on every side.
void read_state(const float* state, bool masked, const Tile& tile, const Scratch& scratch) {
    const Grid& grid = *tile.grid;
    if (masked) {
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
    read_state(state, masked, tile, scratch);
    write_planar(scratch.state, tile, planar);
}

// ---------------------------------------------------------------------------------------------------------------
// Stencils

// A run: neighbouring cells of one row of the tile that lie in one block.
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
// the column filters (1 2 1) and (-1 0 1) serve all three, and three neighbouring cells. Products with the filters'
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
            const Vec centre = load(cell);
            Operand::store(p, centre);
            Operand::store(p + kChannels, smooth2 - smooth0 + 0.0f * smooth1);
            Operand::store(p + 2 * kChannels, slope0 + 2.0f * slope1 + slope2);
            Operand::store(p + 3 * kChannels, smooth0 + 2.0f * smooth1 + smooth2 - 16.0f * centre);
            smooth0 = smooth1, smooth1 = smooth2;
            slope0 = slope1, slope1 = slope2;
        }
    }
}

// The transpose of perceive(): adds to the gradient of the run's cells and of all their neighbours. `direct` is what
// reaches a cell past the update network.
void perceive_back(const float* perception, const float* direct, int length, float* gradient, int row_floats) {
    for (int v = 0; v < kCellVectors; v++) {
        const float* p = perception + v * kLanes;
        const float* d = direct + v * kLanes;
        float* out = gradient + v * kLanes - kChannels;
        // Of the cell before, at and after the column that is written.
        Vec rise0{}, slope0{}, slope1{}, bump1{}, centre1{}, rise1{};
        for (int x = -1; x <= length; x++, out += kChannels) {
            Vec rise2{}, fall2{}, slope2{}, bump2{}, centre2{};
            if (x + 1 < length) {
                const Vec dx = load(p + kChannels);
                bump2 = load(p + 3 * kChannels);
                slope2 = load(p + 2 * kChannels);
                centre2 = load(p) + load(d) - 16.0f * bump2;
                rise2 = bump2 + dx;
                fall2 = bump2 - dx;
                p += kPerception;
                d += kChannels;
            }
            const Vec even = rise0 + 2.0f * bump1 + fall2;
            const Vec odd = slope0 + 2.0f * slope1 + slope2;
            store(out - row_floats, load(out - row_floats) + even - odd);
            store(out, load(out) + 2.0f * even + centre1);
            store(out + row_floats, load(out + row_floats) + even + odd);
            rise0 = rise1, rise1 = rise2;
            slope0 = slope1, slope1 = slope2;
            bump1 = bump2;
            centre1 = centre2;
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

// From the extended state in the scratch memory to the last hidden layer.
template <class Operand>
void hidden_layers(const Packed<Operand>& packed, const Tile& tile, int begin, int cells, const Scratch& scratch) {
    const Block<Operand> block(scratch);
    const int row_floats = (tile.width + 2) * kChannels;
    for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
        perceive<Operand>(scratch.state + (y + 1) * row_floats + (x + 1) * kChannels, row_floats, length,
                          block.perception + done * kPerception);
    });
    product<Operand, kPerception, kHidden1>(
        block.perception, packed.w1, packed.b1, cells,
        [=](int cell, int o, Vec sums) { Operand::store(block.hidden1 + cell * kHidden1 + o, relu(sums)); });
    product<Operand, kHidden1, kHidden2>(
        block.hidden1, packed.w2, packed.b2, cells,
        [=](int cell, int o, Vec sums) { Operand::store(block.hidden2 + cell * kHidden2 + o, relu(sums)); });
}

template <class Operand>
void step(const StepTask& task, const Tile& tile, float* memory) {
    const Packed<Operand>& packed = unpack<Operand>(task.packed);
    const Scratch scratch(tile.height, tile.width, memory);
    const Block<Operand> block(scratch);
    const Grid& grid = *tile.grid;
    const int row_floats = (tile.width + 2) * kChannels;
    read_state(task.from, task.masked, tile, scratch);
    const int total = tile.height * tile.width;
    for (int begin = 0; begin < total; begin += Operand::block) {
        const int cells = min(Operand::block, total - begin);
        hidden_layers(packed, tile, begin, cells, scratch);
        float* update = scratch.update;
        product<Operand, kHidden2, kChannels>(
            block.hidden2, packed.w3, packed.b3, cells,
            [=](int cell, int o, Vec sums) { store(update + cell * kChannels + o, sums); });
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

template <class Operand>
void backward(const BackwardTask& task, const Tile& tile, WeightGradients& gradients, float* memory) {
    const Packed<Operand>& packed = unpack<Operand>(task.packed);
    const Scratch scratch(tile.height, tile.width, memory);
    const int row_floats = (tile.width + 2) * kChannels;
    gather_gradient(task.gradient_to, task.tiles, tile, scratch);
    if (task.life_mask)
        unmask_gradient(task.to, tile, scratch);
    else
        copy_gradient(tile, scratch);
    read_state(task.from, task.masked, tile, scratch);
    float* out = task.gradient_from + tile.extended_before * kChannels;
    std::memset(out, 0, extended_cells(tile) * kChannels * sizeof(float));

    const Block<Operand> block(scratch);
    const int total = tile.height * tile.width;
    for (int begin = 0; begin < total; begin += Operand::block) {
        const int cells = min(Operand::block, total - begin);
        float* delta_floats = scratch.delta + begin * kChannels;
        hidden_layers(packed, tile, begin, cells, scratch);
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
        accumulate<Operand, kHidden2, kChannels>(inputs, deltas, cells, gradients.w3);
        accumulate_bias<Operand, kChannels>(deltas, cells, gradients.b3);
        product<Operand, kChannels, kHidden2>(delta, packed.w3_back, nullptr, cells, [=](int cell, int i, Vec sums) {
            auto* hidden = block.hidden2 + cell * kHidden2 + i;
            Operand::store(hidden, Operand::gate(hidden, sums));
        });

        inputs = Operand::template inputs_by_cells<kHidden1>(block.hidden1, whole_sums, scratch.inputs_by_cells);
        deltas = Operand::template deltas_by_cells<kHidden2>(block.hidden2, whole_sums, scratch.deltas_by_cells);
        accumulate<Operand, kHidden1, kHidden2>(inputs, deltas, cells, gradients.w2);
        accumulate_bias<Operand, kHidden2>(deltas, cells, gradients.b2);
        product<Operand, kHidden2, kHidden1>(block.hidden2, packed.w2_back, nullptr, cells,
                                             [=](int cell, int i, Vec sums) {
                                                 auto* hidden = block.hidden1 + cell * kHidden1 + i;
                                                 Operand::store(hidden, Operand::gate(hidden, sums));
                                             });

        inputs = Operand::template inputs_by_cells<kPerception>(block.perception, whole_sums, scratch.inputs_by_cells);
        deltas = Operand::template deltas_by_cells<kHidden1>(block.hidden1, whole_sums, scratch.deltas_by_cells);
        accumulate<Operand, kPerception, kHidden1>(inputs, deltas, cells, gradients.w1);
        accumulate_bias<Operand, kHidden1>(deltas, cells, gradients.b1);
        float* perception = scratch.perception;
        product<Operand, kHidden1, kPerception>(
            block.hidden1, packed.w1_back, nullptr, cells,
            [=](int cell, int i, Vec sums) { store(perception + cell * kPerception + i, sums); });

        for_runs(tile, begin, cells, [&](int done, int y, int x, int length) {
            perceive_back(perception + done * kPerception, delta_floats + done * kChannels, length,
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

template <class Operand>
double multiply_adds(int64_t rounds) {
#if defined(FASTNCA_TILES)
    if constexpr (Operand::per_word == 2) {
        const TileRegisters registers(kTileSide);
        for (int64_t round = 0; round < rounds; round++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        return 2.0 * 4 * kTileSide * kTileSide * 2 * kTileSide * double(rounds);
    }
#endif
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

template <class Operand>
constexpr PrecisionKernels precision_kernels() {
    return {sizeof(Packed<Operand>) / sizeof(float), pack<Operand>, step<Operand>, backward<Operand>,
            multiply_adds<Operand>};
}

#if defined(__AVX512BF16__)
constexpr PrecisionKernels bf16_kernels = precision_kernels<Bf16>();
constexpr const PrecisionKernels* bf16 = &bf16_kernels;
#else
constexpr const PrecisionKernels* bf16 = nullptr;
#endif

#define FASTNCA_STRING(x) #x
#define FASTNCA_NAME(x) FASTNCA_STRING(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FASTNCA_NAME(FASTNCA_ISA), scratch_floats, read, read_gradient, precision_kernels<Fp32>(),
                         bf16};

}  // namespace FASTNCA_ISA
}  // namespace fastnca
