// Innermost loops of a ridge energy: correlations of an image with many filters, and the profiles.
//
// Included once per instruction set (DR_ISA names it). Lines are padded to complete registers and images by the
// filter's reach, so no loop here tests for the end of the image.
#pragma once
#include "simd.h"

namespace DR_ISA {

constexpr int GROUP = LANES == 16 ? 8 : 4;  // filters, or rows, summed at once
constexpr int WIDE = 3;                     // registers of pixels summed at once

// The channels of a centered, padded image around a row: at the first tap of the first pixel of the first channel.
struct Channels {
    const float* at;
    int count;
    size_t plane, line;  // floats from channel to channel, and from row to row
};

// raw[filter][register] = w_filter * u over V registers of one row, summed over the channels: filters
// [channel][tap][GROUP].
template <int V>
static DR_CALL void responses(const Channels& image, int side, const float* w, float (*raw)[WIDE * LANES]) {
    Vec acc[GROUP][V] = {};
    for (int row = 0; row < image.count * side; ++row) {
        const float* u = image.at + row / side * image.plane + row % side * image.line;
        for (int b = 0; b < side; ++b, w += GROUP) {
            Vec d[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) d[v] = load(u + b + v * LANES);
#pragma GCC unroll 8
            for (int f = 0; f < GROUP; ++f) {
                const Vec wv = broadcast(w[f]);
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v) acc[f][v] += wv * d[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int f = 0; f < GROUP; ++f)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) store(raw[f] + v * LANES, acc[f][v]);
}

// The transpose: add to `rows` rows of `out` the convolution of a group's planes [GROUP][GROUP + K - 1][line], `s` at the
// first tap of the first pixel, with filters [filter][column][row], rotated by half a turn.
template <int K, int V>
static void conv_transposed(const float* s, size_t plane, size_t line, const float* w, float* out, size_t out_line, int rows) {
    Vec acc[GROUP][V] = {};
    for (int f = 0; f < GROUP; ++f, s += plane)
        for (int b = 0; b < K; ++b, w += K) {
            const float* from = s + b;
#pragma GCC unroll 22
            for (int y = 0; y < GROUP + K - 1; ++y) {
                Vec d[V];
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v) d[v] = load(from + y * line + v * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < GROUP; ++r) {
                    if (y < r || y - r >= K) continue;
                    const Vec wv = broadcast(w[y - r]);
#pragma GCC unroll 3
                    for (int v = 0; v < V; ++v) acc[r][v] += wv * d[v];
                }
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) {
        if (r >= rows) return;
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) {
            float* to = out + r * out_line + v * LANES;
            store(to, load(to) + acc[r][v]);
        }
    }
}

// total[filter][tap t][lane] += sum over rows and registers of g_filter(p) u(p + t) + s_filter(p) v(p + t), T taps in a row.
struct Planes {
    const float *g, *s;    // [GROUP][GROUP][width]
    const float *u, *v;    // at the first tap of the first pixel
    size_t line, width;    // floats from row to row of u and v; of g and s
    int rows, side;
};
template <int T>
static DR_CALL void correlate(const Planes& p, DoubleVec* total) {
    Vec acc[GROUP][T] = {};
    for (int y = 0; y < p.rows; ++y)
        for (size_t x = 0; x < p.width; x += LANES) {
            const auto add = [&](const float* planes, const float* image) DR_LAMBDA {
                Vec d[T];
#pragma GCC unroll 3
                for (int t = 0; t < T; ++t) d[t] = load(image + y * p.line + x + t);
#pragma GCC unroll 8
                for (int f = 0; f < GROUP; ++f) {
                    const Vec c = load(planes + (f * GROUP + y) * p.width + x);
#pragma GCC unroll 3
                    for (int t = 0; t < T; ++t) acc[f][t] += c * d[t];
                }
            };
            add(p.g, p.u);
            add(p.s, p.v);
        }
#pragma GCC unroll 8
    for (int f = 0; f < GROUP; ++f)
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) total[f * p.side * p.side + t] += to_double(acc[f][t]);
}

// 1 / sqrt(a), 1 <= a < 1e37, accurate to about the rounding of a product.
static DR_INLINE Vec inverse_root(Vec a) {
#if DR_LANES == 16
    const Vec y = (Vec)_mm512_rsqrt14_ps((__m512)a), e = 1.0f - a * y * y;
    return y + 0.5f * y * e;
#elif DR_LANES == 8
    const Vec y = (Vec)_mm256_rsqrt_ps((__m256)a), e = 1.0f - a * y * y;
    return y + y * e * (0.5f + 0.375f * e);
#else
    return rsqrt(a);
#endif
}

// The profile of one filter: coefficients and squared scales.
struct Profile {
    const float *c, *s2;
    int steps;
};
// Beyond this every step is constant to rounding, and its square does not overflow.
constexpr float FAR = 1e15f;

// psi', psi'' and, if requested, psi.
struct Curve {
    Vec slope, bend, value;
};
template <bool BEND, bool VALUE>
static DR_INLINE Curve curve(Vec t, const Profile& p) {
    t = clamp(t, -FAR, FAR);
    const Vec t2 = t * t;
    Curve out{};
    for (int k = 0; k < p.steps; ++k) {
        const Vec a = t2 * p.s2[k] + 1.0f, root = inverse_root(a);
        out.slope += root * p.c[k];
        if (BEND) out.bend += root * root * root * p.c[k];  // not of root * c: the slope's bits would depend on BEND
        if (VALUE) out.value += reciprocal(1.0f + a * root) * p.c[k];
    }
    out.slope *= t;
    out.value *= t2;
    return out;
}

}  // namespace DR_ISA
