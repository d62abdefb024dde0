// The Walsh-Hadamard transform in blocks. Included once per instruction set (DR_ISA names it).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "select.h"
#include "simd.h"
#include "srm.h"

namespace DR_ISA {

using dr::Srm;

// Pairs of lanes that differ in bit H: their sum in one, their difference in the other.
template <int H>
static DR_INLINE Vec16 butterfly(Vec16 v) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)v.r[0];
    const __m512 other = H == 1   ? _mm512_permute_ps(a, 0xb1)
                         : H == 2 ? _mm512_permute_ps(a, 0x4e)
                         : H == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                                  : _mm512_shuffle_f32x4(a, a, 0x4e);
    Vec sign;
    for (int j = 0; j < 16; ++j) sign[j] = j & H ? -1.0f : 1.0f;
    v.r[0] = v.r[0] * sign + (Vec)other;
    return v;
#else
    Vec16 w;
    if constexpr (H < LANES) {
        IntVec index;
        Vec sign;
        for (int j = 0; j < LANES; ++j) index[j] = j ^ H, sign[j] = j & H ? -1.0f : 1.0f;
        DR_EACH_REGISTER w.r[k] = __builtin_shuffle(v.r[k], index) + v.r[k] * sign;
    } else {
        constexpr int other = H / LANES;
        DR_EACH_REGISTER w.r[k] = k & other ? v.r[k ^ other] - v.r[k] : v.r[k] + v.r[k ^ other];
    }
    return w;
#endif
}
// The Walsh-Hadamard transform of the lanes in blocks of up to 16.
static DR_INLINE Vec16 walsh_lanes(Vec16 v, int block) {
    if (block > 1) v = butterfly<1>(v);
    if (block > 2) v = butterfly<2>(v);
    if (block > 4) v = butterfly<4>(v);
    if (block > 8) v = butterfly<8>(v);
    return v;
}
template <int N>
static DR_INLINE void walsh_lanes(Vec16 (&v)[N], int block) {
    const auto all_of = [&](auto step) DR_LAMBDA {
        for (Vec16& t : v) t = step(t);
    };
    if (block > 1) all_of([](Vec16 t) DR_LAMBDA { return butterfly<1>(t); });
    if (block > 2) all_of([](Vec16 t) DR_LAMBDA { return butterfly<2>(t); });
    if (block > 4) all_of([](Vec16 t) DR_LAMBDA { return butterfly<4>(t); });
    if (block > 8) all_of([](Vec16 t) DR_LAMBDA { return butterfly<8>(t); });
}
// The same for the d values of an image in place, in blocks of any power of two, over sqrt(block).
static void walsh(const Srm& s, float* plane, std::size_t d) {
    const Vec16 scale = broadcast16(1.0f / std::sqrt(static_cast<float>(s.block)));
    const auto lanes = [&](int block) {
        std::size_t i = 0;
        if (block == 16)
            for (; i + 16 <= d; i += 16) store(plane + i, walsh_lanes(load16(plane + i), 16) * scale);
        for (; i + 16 <= d; i += 16) store(plane + i, walsh_lanes(load16(plane + i), block) * scale);
        if (i < d) {
            // The remainder consists of complete blocks, which the zero padding does not affect.
            float edge[16] = {};
            std::copy(plane + i, plane + d, edge);
            store(edge, walsh_lanes(load16(edge), block) * scale);
            std::copy(edge, edge + (d - i), plane + i);
        }
    };
    lanes(std::min(s.block, 16));
    for (std::size_t h = 16; h < static_cast<std::size_t>(s.block); h *= 2)
        for (std::size_t i = 0; i < d; i += 2 * h)
            for (std::size_t j = i; j < i + h; j += 16) {
                const Vec16 a = load16(plane + j), b = load16(plane + j + h);
                store(plane + j, a + b);
                store(plane + j + h, a - b);
            }
}

// The signs of 32 vectors, the first in the top bits.
struct Signs {
    IntVec r[REGISTERS];
};
// v with the signs of vector j.
static DR_INLINE Vec16 with_signs(Vec16 v, const Signs& signs, int j) {
    DR_EACH_REGISTER {
        IntVec bits;
        std::memcpy(&bits, &v.r[k], sizeof bits);
        bits ^= signs.r[k] << j & INT32_MIN;
        std::memcpy(&v.r[k], &bits, sizeof bits);
    }
    return v;
}

// Current position of a pass over an image.
struct Cursor {
    const float *x, *y, *end;
    float* out;
    const std::uint16_t* kept;
};
// N vectors at once, to hide the latency of a transform; FULL: at least 16 N measurements remain.
template <dr::Product PRODUCT, int N, bool FULL>
static DR_INLINE void walsh_vectors(Cursor& p, const Signs& signs, int block, Vec16 scale, Vec16 weight) {
    using dr::Product;
    Vec16 v[N];
    if constexpr (PRODUCT != Product::adjoint) {
        for (int j = 0; j < N; ++j) v[j] = with_signs(load16(p.x + 16 * j), signs, j);
        walsh_lanes(v, block);
    }
    if constexpr (PRODUCT == Product::forward) {
        for (int j = 0; j < N; ++j) p.out = compress_store<FULL>(p.out, p.end, v[j] * scale, p.kept[j]);
    } else {
        for (int j = 0; j < N; ++j) {
            if (PRODUCT == Product::normal) v[j] = masked(v[j] * scale, p.kept[j]);
            if (PRODUCT == Product::adjoint) v[j] = expand_load<FULL>(p.y, p.end, p.kept[j]);
            if (PRODUCT == Product::correct)
                v[j] = masked(mul_add(v[j], scale, expand_load<FULL>(p.y, p.end, p.kept[j])), p.kept[j]);
        }
        walsh_lanes(v, block);
        for (int j = 0; j < N; ++j) {
            v[j] = with_signs(v[j], signs, j);
            store(p.out + 16 * j, PRODUCT == Product::correct ? mul_add(v[j], weight, load16(p.x + 16 * j)) : v[j] * weight);
        }
        p.out += 16 * N;
    }
    p.x += 16 * N, p.kept += N;
}

// Walsh-Hadamard in blocks of up to 16 without a permutation: nothing crosses a vector, so one pass suffices.
template <dr::Product PRODUCT>
static void walsh_product(const Srm& s, Cursor p, float weight) {
    constexpr int N = 4;
    const auto pass = [&](int block) DR_LAMBDA {
        const double norm = 1.0 / std::sqrt(static_cast<double>(block));
        const bool correct = PRODUCT == dr::Product::correct;
        const Vec16 scale = broadcast16(static_cast<float>(correct ? -norm : norm));
        const Vec16 w = broadcast16(static_cast<float>(correct ? norm * weight : norm));
        const auto left = [&]() DR_LAMBDA { return p.end - (PRODUCT == dr::Product::forward ? p.out : p.y); };
        const std::size_t count = s.kept.size();
        Signs signs;
        std::size_t i = 0;
        for (; i + N <= count; i += N) {
            if (i % 32 == 0)
                std::memcpy(&signs, s.sign_bits.data() + i / 2, sizeof signs);
            else
                DR_EACH_REGISTER signs.r[k] <<= N;
            if (left() >= 16 * N)
                walsh_vectors<PRODUCT, N, true>(p, signs, block, scale, w);
            else
                walsh_vectors<PRODUCT, N, false>(p, signs, block, scale, w);
        }
        for (; i < count; ++i) {
            std::memcpy(&signs, s.sign_bits.data() + i / 32 * 16, sizeof signs);
            DR_EACH_REGISTER signs.r[k] <<= static_cast<int>(i % 32);
            walsh_vectors<PRODUCT, 1, false>(p, signs, block, scale, w);
        }
    };
    s.block == 16 ? pass(16) : pass(s.block);
}
static void walsh_product(const Srm& s, dr::Product product, const float* x, const float* y, float weight, float* out) {
    using dr::Product;
    const float* end = (product == Product::forward ? out : y) + s.measurements;
    const Cursor start{x, y, end, out, s.kept.data()};
    switch (product) {
        case Product::forward: return walsh_product<Product::forward>(s, start, weight);
        case Product::adjoint: return walsh_product<Product::adjoint>(s, start, weight);
        case Product::normal: return walsh_product<Product::normal>(s, start, weight);
        case Product::correct: return walsh_product<Product::correct>(s, start, weight);
    }
}

}  // namespace DR_ISA
