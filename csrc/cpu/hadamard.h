// Products with a Hadamard matrix of any order. Included once per instruction set (DR_ISA names it).
#pragma once
#include <cmath>

#include "lines.h"
#include "srm.h"

namespace DR_ISA {

using dr::Lines;

// The 32 signed sums of 5 inputs, [32][16] of the real parts, then of the imaginary ones.
static DR_INLINE void signed_sums(const Complex (&t)[5], float* sums) {
    const Complex zero{broadcast16(0.0f), broadcast16(0.0f)}, minus = zero - t[0];
    const Complex low[4] = {t[0] + t[1], minus + t[1], t[0] - t[1], minus - t[1]};
    const Complex high[4] = {t[2] + t[3], t[3] - t[2], t[2] - t[3], zero - t[2] - t[3]};
    for (int j = 0; j < 4; ++j) {
        const Complex plus = high[j] + t[4], less = high[j] - t[4];
        for (int i = 0; i < 4; ++i) {
            const Complex a = low[i] + plus, b = low[i] + less;
            float* at = sums + 16 * (4 * j + i);
            store(at, a.re), store(at + 512, a.im), store(at + 256, b.re), store(at + 768, b.im);
        }
    }
}
// The sum over COUNT groups of the signed sums that the bytes of `pick` select.
template <int COUNT>
static DR_INLINE Complex picked(const float* sums, std::uint64_t pick) {
    const auto at = [&](int g) DR_LAMBDA {
        const float* p = sums + 1024 * g + 2 * (pick >> 8 * g & 255);
        return Complex{load16(p), load16(p + 512)};
    };
    Complex sum = at(0);
#pragma GCC unroll 8
    for (int g = 1; g < COUNT; ++g) sum = sum + at(g);
    return sum;
}

// H or H^T times 32 lines, over sqrt(n). Each 5 inputs have 32 signed sums; an output adds one of each ("four Russians").
template <int COUNT, class Save>
static DR_INLINE void hadamard_chunk(const Lines& plan, bool transposed, int chunk, float* a, const float* sums, Save save) {
    const int n = plan.n, chunks = plan.chunks();
    const std::uint64_t* pick = plan.picks[transposed].data() + chunk;
    const float scale = 1.0f / std::sqrt(static_cast<float>(n));
    const bool last = chunk + 1 == chunks;
    for (int k = 0; k < n; ++k, pick += chunks) {
        Complex sum = picked<COUNT>(sums, *pick);
        if (chunk) sum = sum + load_complex(a + k * LINES);
        if (last)
            save(k, scaled(sum, scale));
        else
            store(a + k * LINES, sum);
    }
}
template <class Load, class Save>
static DR_INLINE void hadamard(const Lines& plan, bool transposed, float* a, float* sums, Load load_row, Save save) {
    constexpr int R = Lines::GROUP;
    for (int c = 0; c < plan.chunks(); ++c) {
        const int g0 = plan.first_group(c), count = plan.first_group(c + 1) - g0;
        for (int g = 0; g < count; ++g) {
            Complex t[R];
            for (int i = 0; i < R; ++i) {
                const int j = R * (g0 + g) + i;
                t[i] = j < plan.n ? load_row(j) : Complex{broadcast16(0.0f), broadcast16(0.0f)};
            }
            signed_sums(t, sums + 1024 * g);
        }
        switch (count) {  // the sums of a chunk stay in the L1 cache
            case 1: hadamard_chunk<1>(plan, transposed, c, a, sums, save); break;
            case 2: hadamard_chunk<2>(plan, transposed, c, a, sums, save); break;
            case 3: hadamard_chunk<3>(plan, transposed, c, a, sums, save); break;
            case 4: hadamard_chunk<4>(plan, transposed, c, a, sums, save); break;
            case 5: hadamard_chunk<5>(plan, transposed, c, a, sums, save); break;
            case 6: hadamard_chunk<6>(plan, transposed, c, a, sums, save); break;
            case 7: hadamard_chunk<7>(plan, transposed, c, a, sums, save); break;
            default: hadamard_chunk<8>(plan, transposed, c, a, sums, save);
        }
    }
}

}  // namespace DR_ISA
