// Gradients of a convolution's filters: products of its input with the cotangents of its output, summed over a piece of a
// pair of rows. Included once per instruction set (DR_ISA names it).
#pragma once
#include "conv.h"

namespace DR_ISA {

// sums[9][lane] += the tiles' four pixels g times the patch around them, one tap after another.
static DR_INLINE void add_taps(const Vec (&g)[4], const Patch& p, float* sums) {
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
        Vec s = load(sums + tap * LANES);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) s += g[k] * p.d[k / 2 + tap / 3][k % 2 + tap % 3];
        store(sums + tap * LANES, s);
    }
}

// dw[channel][9][lane] += sum over the tiles of one(x + tap) cot(x).
static DR_CALL void weight_grad_from_one(const Rows& one, const float* cot, int v0, int n, const Layout& y, float* dw) {
    const size_t row = static_cast<size_t>(y.channels) * 2 * n * LANES;
    for (int v = 0; v < n; ++v) {
        const Patch p(one, static_cast<size_t>(v0 + v) * LANES, y.line);
        float* to = dw;
        const float* from = cot + v * LANES;
        for (int c = 0; c < y.channels; ++c, to += 9 * LANES, from += 2 * n * LANES) {
            Vec g[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) g[k] = load(from + k / 2 * row + k % 2 * n * LANES);
            add_taps(g, p, to);
        }
    }
}

// dw[channel][9][lane] += sum over the tiles of cot(x) many(x + tap), for a cotangent of one channel.
static DR_CALL void weight_grad_to_one(const Rows& many, const float* cot, int v0, int n, const Layout& y, float* dw) {
    for (int v = 0; v < n; ++v) {
        Vec g[4];
        for (int k = 0; k < 4; ++k) g[k] = load(cot + (k * n + v) * LANES);
        float* to = dw;
        size_t line = static_cast<size_t>(v0 + v) * LANES;
        for (int c = 0; c < y.channels; ++c, to += 9 * LANES, line += 2 * y.line) {
            const Patch p(many, line, y.line);
            add_taps(g, p, to);
        }
    }
}

// Inputs whose sums with LANES outputs fit in registers.
constexpr int INPUTS = LANES == 16 ? 16 : 8;

// Floats of scratch for `winograd_weight_grad`.
constexpr size_t WEIGHT_GRAD_SCRATCH = static_cast<size_t>(LANES) * 8 * LANES;

// Row I of the transformed cotangents, channels last: [tile][4][lane] of [tile][row][parity][lane].
template <int I>
static DR_INLINE void transform_cotangents(const float* g, float* to) {
    for (int t = 0; t < LANES; ++t, g += 4 * LANES, to += 4 * LANES) {
        Vec e, o;
        if (I == 0) e = load(g), o = load(g + LANES);
        if (I == 1) e = load(g) + load(g + 2 * LANES), o = load(g + LANES) + load(g + 3 * LANES);
        if (I == 2) e = load(g) - load(g + 2 * LANES), o = load(g + LANES) - load(g + 3 * LANES);
        if (I == 3) e = load(g + 2 * LANES), o = load(g + 3 * LANES);
        store(to, e), store(to + LANES, e + o), store(to + 2 * LANES, e - o), store(to + 3 * LANES, o);
    }
}

// dw[in][LANES] += sum over the tiles of a register of u[in][tile] row[tile][lane]. A few sums fill the registers.
template <class Count>
static DR_INLINE void add_outer_products(const float* u, const float* row, Count count, float* dw) {
    Vec acc[INPUTS] = {};
#pragma GCC unroll 16
    for (int c = 0; c < INPUTS; ++c)
        if (c < count) acc[c] = load(dw + c * LANES);
    for (int t = 0; t < LANES; ++t) {
        const Vec g = load(row + t * 4 * LANES);
#pragma GCC unroll 16
        for (int c = 0; c < INPUTS; ++c)
            if (c < count) acc[c] += broadcast(u[c * LANES + t]) * g;
    }
#pragma GCC unroll 16
    for (int c = 0; c < INPUTS; ++c)
        if (c < count) store(dw + c * LANES, acc[c]);
}

template <int I>
static DR_INLINE void winograd_grad_row(const Rows& in, int v, const Layout& y, int b, float* u, float* scratch, float* dw) {
    const int channels = y.channels;
    float* row = scratch + LANES * 4 * LANES;
    transform_input<1, I>(in, v, y, u);
    transform_cotangents<I>(scratch, row);
    for (int j = 0; j < 4; ++j) {
        const size_t block = static_cast<size_t>(4 * I + j) * ((channels + LANES - 1) / LANES) + b / LANES;
        for (int c = 0; c < channels; c += INPUTS) {
            const float* a = u + static_cast<size_t>(j * channels + c) * LANES;
            float* to = dw + (block * channels + c) * LANES;
            if (channels - c >= INPUTS)
                add_outer_products(a, row + j * LANES, std::integral_constant<int, INPUTS>{}, to);
            else
                add_outer_products(a, row + j * LANES, channels - c, to);
        }
    }
}

// Winograd's own gradient: dw[16 positions][out / LANES][in][LANES] += sum over the tiles of in's transformed patches
// times the transformed cotangents; `winograd_filter_grad` computes the filters' gradient from it. One register of tiles at a
// time: more of them, with the sums, would not fit in the L1 cache.
static DR_CALL void winograd_weight_grad(const Rows& in, const float* cot, int v0, int n, const Layout& y, float* u,
                                         float* scratch, float* dw) {
    const size_t row = static_cast<size_t>(y.channels) * 2 * n * LANES;
    for (int v = 0; v < n; ++v)
        for (int b = 0; b < y.channels; b += LANES) {
            for (int k = 0; k < 4; ++k) {
                const float* from = cot + k / 2 * row + static_cast<size_t>(k % 2 * n + v) * LANES;
                Vec a[LANES];
                for (int j = 0; j < LANES; ++j)
                    a[j] = b + j < y.channels ? load(from + static_cast<size_t>(b + j) * 2 * n * LANES) : Vec{};
                transpose(a);
                for (int t = 0; t < LANES; ++t) store(scratch + (t * 4 + k) * LANES, a[t]);
            }
            winograd_grad_row<0>(in, v0 + v, y, b, u, scratch, dw);
            winograd_grad_row<1>(in, v0 + v, y, b, u, scratch, dw);
            winograd_grad_row<2>(in, v0 + v, y, b, u, scratch, dw);
            winograd_grad_row<3>(in, v0 + v, y, b, u, scratch, dw);
        }
}

static size_t winograd_grad_size(int channels) {
    return static_cast<size_t>(16) * ((channels + LANES - 1) / LANES) * channels * LANES;
}

// Convert to [out][in][9]. F contains the transform's -1 of the last row and column, omitted above.
static void winograd_filter_grad(const double* dw, int channels, double* out) {
    constexpr double F[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, -1}};
    const size_t blocks = (channels + LANES - 1) / LANES;
    for (int o = 0; o < channels; ++o)
        for (int i = 0; i < channels; ++i)
            for (int tap = 0; tap < 9; ++tap) {
                double s = 0.0;
                for (int p = 0; p < 16; ++p)
                    s += F[p / 4][tap / 3] * F[p % 4][tap % 3] *
                         dw[((p * blocks + o / LANES) * channels + i) * LANES + o % LANES];
                *out++ = s;
            }
}

}  // namespace DR_ISA
