// The tables of a structurally random matrix in the layouts of srm.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "srm.h"

namespace dr {

// The twiddles of an FFT of n points in the order of fft.h, and the angles of a DCT.
inline Lines dct_lines(int n) {
    const double pi = 3.14159265358979323846;
    Lines plan;
    plan.n = n;
    int rest = n;
    for (const int radix : {4, 2, 3, 5})
        for (; rest % radix == 0; rest /= radix) plan.radices.push_back(radix);
    for (int radix = 7; rest > 1; radix += 2)
        for (; rest % radix == 0; rest /= radix) plan.radices.push_back(radix);
    const auto push_root = [&](double turns) {
        plan.twiddles.push_back(static_cast<float>(std::cos(2 * pi * turns)));
        plan.twiddles.push_back(static_cast<float>(-std::sin(2 * pi * turns)));
    };
    long before = 1;
    for (const int radix : plan.radices) {
        const long inner = n / (before * radix);
        for (long i = 0; i < inner; ++i)
            for (long j = 1; j < radix; ++j) push_root(static_cast<double>(before * i * j % n) / n);
        for (long j = 0; j < radix && radix > 5; ++j) push_root(static_cast<double>(j) / radix);
        before *= radix;
    }
    for (int k = 0; 2 * k <= n; ++k) {
        const double angle = pi * k / (2.0 * n), scale = k ? std::sqrt(0.5 / n) : std::sqrt(1.0 / n);
        plan.angles.push_back(static_cast<float>(scale * std::cos(angle)));
        plan.angles.push_back(static_cast<float>(scale * std::sin(angle)));
    }
    return plan;
}

// For `matrix` [n, n] of +-1: the signed sums that each output uses.
inline Lines hadamard_lines(int n, const std::int8_t* matrix) {
    Lines plan;
    plan.n = n;
    for (int transposed = 0; transposed < 2; ++transposed)
        for (int k = 0; k < n; ++k)
            for (int c = 0; c < plan.chunks(); ++c) {
                std::uint64_t picks = 0;
                for (int j = plan.GROUP * plan.first_group(c); j < std::min(n, plan.GROUP * plan.first_group(c + 1)); ++j) {
                    const int group = j / plan.GROUP - plan.first_group(c), bit = 8 * group + 3 + j % plan.GROUP;
                    const bool negative = (transposed ? matrix[j * n + k] : matrix[k * n + j]) < 0;
                    picks |= static_cast<std::uint64_t>(negative) << bit;
                }
                plan.picks[transposed].push_back(picks);
            }
    return plan;
}

// `Srm::sign_bits` of n signs.
inline std::vector<std::int32_t> pack_signs(const std::int8_t* signs, std::size_t n) {
    std::vector<std::uint32_t> bits((n + 511) / 512 * 16);
    for (std::size_t i = 0; i < n; ++i)
        if (signs[i] < 0) bits[i / 512 * 16 + i % 16] |= 1u << (31 - i / 16 % 32);
    return {bits.begin(), bits.end()};
}

// `Srm::kept` of the selected ones of d coefficients.
inline std::vector<std::uint16_t> pack_selection(const std::int64_t* rows, int count, std::size_t d) {
    std::vector<std::uint16_t> bits((d + 15) / 16);
    for (int j = 0; j < count; ++j) {
        if (j && rows[j] <= rows[j - 1]) throw std::invalid_argument("rows must be sorted and different");
        bits[rows[j] / 16] |= static_cast<std::uint16_t>(1u << rows[j] % 16);
    }
    return bits;
}

}  // namespace dr
