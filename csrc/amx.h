// The bf16 products in the matrix registers of AMX, which have sixteen times the peak of vdpbf16ps: a square of 16 x 16
// sums takes all products of 16 rows of words with 16 columns. For kernels.cpp only, see there.
#pragma once

#include "products.h"

namespace fastnca::FASTNCA_ISA {
namespace {

constexpr int kSide = 16;  // of a square, and the words of a full row or column

// The sums of a weight gradient run along the rows of its left factor, so that one is transposed.
struct AmxBf16 : Bf16 {
    static constexpr int cells_per_sum = 2 * kSide;
    static constexpr int block = 256;
    static_assert(block % (2 * kSide) == 0, "a block must hold the cells of whole squares, two at a time");

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

private:
    static FASTNCA_INLINE void transpose(Words (&rows)[kLanes]) {
        exchange<8>(rows);
        exchange<4>(rows);
        exchange<2>(rows);
        exchange<1>(rows);
    }
    // In each square of 2 n rows and columns, exchanges the upper right and the lower left quarter.
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
#undef FASTNCA_LANES
    }
};

// GCC does not see that AMX instructions read memory: what was stored there before must not be delayed.
FASTNCA_INLINE void finish_stores(const void* to) { __asm__ volatile("" : : "r"(to) : "memory"); }

// While it lives, the thread's AMX registers are ready for products over rows of so many words: 0...3 hold sums, 4 and
// 5 the left factor, 6 and 7 the right one.
class AmxRegisters {
public:
    explicit AmxRegisters(int words) {
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
    ~AmxRegisters() { _tile_release(); }
};

// Two squares down by two across at a time, or by the only one across.
template <int kIn, int kOut>
struct Matrix<AmxBf16, kIn, kOut> {
    static constexpr int columns = Patch<kOut>::columns;
    static constexpr int across = min(columns / kSide, 2);

    template <class Emit>
    static FASTNCA_INLINE void product(const uint16_t* in, const uint16_t* packed, const float* bias, int cells,
                                       const Emit& emit) {
        constexpr int words = min(kIn / 2, kSide);
        alignas(64) float sums[2][2][kSide][kSide];
        const AmxRegisters registers(words);
        finish_stores(in);
        for (int panel = 0; panel < kOut; panel += columns, packed += kIn * columns)
            for (int cell = 0; cell < cells; cell += 2 * kSide)
                for (int o = 0; o < columns; o += across * kSide) {
                    if (bias) {
                        _tile_loadd(0, bias + panel + o, 0);
                        _tile_loadd(1, bias + panel + o, 0);
                        if (across == 2) {
                            _tile_loadd(2, bias + panel + o + kSide, 0);
                            _tile_loadd(3, bias + panel + o + kSide, 0);
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
                        _tile_loadd(5, x + kSide * kIn, kIn * 2);
                        _tile_loadd(6, w, columns * 4);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 5, 6);
                        if (across == 2) {
                            _tile_loadd(7, w + 2 * kSide, columns * 4);
                            _tile_dpbf16ps(2, 4, 7);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                    }
                    _tile_stored(0, sums[0][0], kSide * 4);
                    _tile_stored(1, sums[0][1], kSide * 4);
                    if (across == 2) {
                        _tile_stored(2, sums[1][0], kSide * 4);
                        _tile_stored(3, sums[1][1], kSide * 4);
                    }
                    for (int k = 0; k < across; k++)
                        for (int c = 0; c < 2 * kSide; c++)
                            emit(cell + c, panel + o + k * kSide, load(&sums[k][0][0][0] + c * kSide));
                }
    }

    // Unlike the general accumulate(), it starts its sums from what was there.
    static void accumulate(const uint16_t* in, const uint16_t* delta, int cells, float* gradient) {
        const AmxRegisters registers(kSide);
        finish_stores(in);
        for (int i = 0; i < kIn; i += 2 * kSide)
            for (int o = 0; o < kOut; o += across * kSide) {
                float* sum = gradient + i * kOut + o;
                _tile_loadd(0, sum, kOut * 4);
                _tile_loadd(1, sum + kSide * kOut, kOut * 4);
                if (across == 2) {
                    _tile_loadd(2, sum + kSide, kOut * 4);
                    _tile_loadd(3, sum + kSide * kOut + kSide, kOut * 4);
                }
                for (int cell = 0; cell < cells; cell += AmxBf16::cells_per_sum) {
                    const uint16_t* x = in + i * AmxBf16::block + cell;
                    const uint16_t* d = delta + cell * kOut + 2 * o;
                    _tile_loadd(4, x, AmxBf16::block * 2);
                    _tile_loadd(5, x + kSide * AmxBf16::block, AmxBf16::block * 2);
                    _tile_loadd(6, d, kOut * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 5, 6);
                    if (across == 2) {
                        _tile_loadd(7, d + 2 * kSide, kOut * 4);
                        _tile_dpbf16ps(2, 4, 7);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, sum, kOut * 4);
                _tile_stored(1, sum + kSide * kOut, kOut * 4);
                if (across == 2) {
                    _tile_stored(2, sum + kSide, kOut * 4);
                    _tile_stored(3, sum + kSide * kOut + kSide, kOut * 4);
                }
            }
    }
};

template <>
double multiply_adds<AmxBf16>(int64_t rounds) {
    const AmxRegisters registers(kSide);
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 2.0 * 4 * kSide * kSide * 2 * kSide * double(rounds);
}

}  // namespace
}  // namespace fastnca::FASTNCA_ISA
