// 3 x 3 convolutions of rows, channels last: the loops that a sweep spends its time in.
//
// Included once per instruction set (DR_ISA names it). A row is given by the zero pixel to its left.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "aligned.h"
#include "conv_chain.h"
#include "simd.h"

namespace DR_ISA {

constexpr int BLOCK = 16;
#if DR_PARTS == 1
constexpr int PIXELS = 12;  // 12 accumulators, a weight, a broadcast operand: what 32 registers hold with ease
constexpr int TILES = 6;    // times 4 positions: 24 accumulators
constexpr int POSITIONS = 4;
#elif DR_PARTS == 2
constexpr int PIXELS = 6;
constexpr int TILES = 6;
constexpr int POSITIONS = 1;
#else
constexpr int PIXELS = 3;
constexpr int TILES = 3;
constexpr int POSITIONS = 1;
#endif

// The rows above, at and below, or (for Winograd) the four rows about a pair; each from its left zero pixel on.
template <int N>
struct Rows {
    const float* at[N];
};

static DR_INLINE std::size_t at(int pixel, int channels) { return static_cast<std::size_t>(pixel) * channels; }

// Calls `body(x, integral_constant<P>)` over a row in groups of P pixels.
template <int P, class F>
static DR_INLINE void groups(int width, F body) {
    int x = 0;
    for (; x + P <= width; x += P) body(x, std::integral_constant<int, P>{});
    for (; x + 4 <= width && P > 4; x += 4) body(x, std::integral_constant<int, 4>{});
    for (; x < width; ++x) body(x, std::integral_constant<int, 1>{});
}

// One channel to all: filters [block][tap][16].
static void expand_row(const Rows<3>& in, int width, int blocks, const float* w, const float* bias, float* out) {
    const int channels = blocks * BLOCK;
    for (int b = 0; b < blocks; ++b, w += 9 * BLOCK) {
        const V start = bias ? load(bias + b * BLOCK) : all(0.0f);
        groups<PIXELS>(width, [&](int x, auto count) {
            V acc[count()];
            for (int p = 0; p < count(); ++p) acc[p] = start;
            for (int tap = 0; tap < 9; ++tap) {
                const V wv = load(w + tap * BLOCK);
                const float* a = in.at[tap / 3] + x + tap % 3;
#pragma GCC unroll 16
                for (int p = 0; p < count(); ++p) acc[p] = fma(all(a[p]), wv, acc[p]);
            }
            for (int p = 0; p < count(); ++p) store(out + at(x + p, channels) + b * BLOCK, acc[p]);
        });
    }
}

// 16 channels to 16: filters [tap][c_in][16].
static void direct_row(const Rows<3>& in, int width, const float* w, const float* bias, float* out) {
    const V start = bias ? load(bias) : all(0.0f);
    groups<PIXELS>(width, [&](int x, auto count) {
        V acc[count()];
        for (int p = 0; p < count(); ++p) acc[p] = start;
        const float* f = w;
        for (int tap = 0; tap < 9; ++tap) {
            const float* a = in.at[tap / 3] + at(x + tap % 3, BLOCK);
            for (int c = 0; c < BLOCK; ++c, f += BLOCK) {
                const V wv = load(f);
#pragma GCC unroll 16
                for (int p = 0; p < count(); ++p) acc[p] = fma(all(a[p * BLOCK + c]), wv, acc[p]);
            }
        }
        for (int p = 0; p < count(); ++p) store(out + at(x + p, BLOCK), acc[p]);
    });
}

// Winograd's F(2 x 2, 3 x 3): 16 products make 4 pixels, where the direct sum takes 36 (Lavin and Gray 2016).
// `u` [c_in / 16][16 positions][N tiles][16] are the transformed 4 x 4 patches; filters [block][4][c_in][4][16].
template <int N>
static DR_INLINE void winograd_tiles(const Rows<4>& in, int x, int width, int blocks, const float* w, const float* bias,
                                     float* u, float* const (&out)[2]) {
    const int channels = blocks * BLOCK;
    for (int b = 0; b < blocks; ++b) {
        // Columns are transformed once; neighbouring tiles share two of them.
        V left[2][4];
        const auto column = [&](int k, V(&v)[4]) {
            V d[4];
            for (int i = 0; i < 4; ++i) d[i] = load(in.at[i] + at(x + k, channels) + b * BLOCK);
            v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
        };
        column(0, left[0]);
        column(1, left[1]);
        for (int t = 0; t < N; ++t) {
            V right[2][4];
            column(2 * t + 2, right[0]);
            column(2 * t + 3, right[1]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                float* to = u + ((b * 16 + 4 * i) * N + t) * BLOCK;
                store(to, left[0][i] - right[0][i]);
                store(to + N * BLOCK, left[1][i] + right[0][i]);
                store(to + 2 * N * BLOCK, right[0][i] - left[1][i]);
                store(to + 3 * N * BLOCK, left[1][i] - right[1][i]);
                left[0][i] = right[0][i];
                left[1][i] = right[1][i];
            }
        }
    }
    for (int b = 0; b < blocks; ++b) {
        V y[2][2][N];
        const V start = bias ? load(bias + b * BLOCK) : all(0.0f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, w += 4 * channels * BLOCK) {
            V m[4][N];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j += POSITIONS) {
                V acc[POSITIONS][N];
                for (int k = 0; k < POSITIONS; ++k)
                    for (int t = 0; t < N; ++t) acc[k][t] = all(0.0f);
                const float* f = w + j * BLOCK;
                for (int block = 0; block < blocks; ++block) {
                    const float* a = u + (block * 16 + 4 * i + j) * N * BLOCK;
#pragma GCC unroll 2
                    for (int c = 0; c < BLOCK; ++c, f += 4 * BLOCK)
#pragma GCC unroll 4
                        for (int k = 0; k < POSITIONS; ++k) {
                            const V wv = load(f + k * BLOCK);
#pragma GCC unroll 16
                            for (int t = 0; t < N; ++t) acc[k][t] = fma(all(a[(k * N + t) * BLOCK + c]), wv, acc[k][t]);
                        }
                }
                for (int k = 0; k < POSITIONS; ++k)
                    for (int t = 0; t < N; ++t) m[j + k][t] = acc[k][t];
            }
            for (int t = 0; t < N; ++t) {
                const V s[2] = {m[0][t] + m[1][t] + m[2][t], m[1][t] - m[2][t] - m[3][t]};
                for (int k = 0; k < 2; ++k) {
                    if (i == 0) y[0][k][t] = s[k] + start;
                    if (i == 1) y[0][k][t] = y[0][k][t] + s[k], y[1][k][t] = s[k] + start;
                    if (i == 2) y[0][k][t] = y[0][k][t] + s[k], y[1][k][t] = y[1][k][t] - s[k];
                    if (i == 3) y[1][k][t] = y[1][k][t] - s[k];
                }
            }
        }
        for (int r = 0; r < 2; ++r)
            for (int t = 0; t < N; ++t)
                for (int k = 0; k < 2; ++k)
                    if (const int p = x + 2 * t + k; p < width) store(out[r] + at(p, channels) + b * BLOCK, y[r][k][t]);
    }
}

// A pair of rows, all channels to all. `u` holds 16 TILES channels floats; an odd width needs two zero pixels on the
// right of the rows of `in`.
static void winograd_pair(const Rows<4>& in, int width, int blocks, const float* w, const float* bias, float* u,
                          float* const (&out)[2]) {
    int x = 0;
    for (; x + 2 * TILES <= width; x += 2 * TILES) winograd_tiles<TILES>(in, x, width, blocks, w, bias, u, out);
    if constexpr (TILES > 3)
        for (; x + 6 <= width; x += 6) winograd_tiles<3>(in, x, width, blocks, w, bias, u, out);
    for (; x < width; x += 2) winograd_tiles<1>(in, x, width, blocks, w, bias, u, out);
}

// All channels to one: filters [tap][channels].
static void reduce_row(const Rows<3>& in, int width, int blocks, const float* w, float bias, float* out) {
    const int channels = blocks * BLOCK;
    for (int x = 0; x < width; x += 16) {
        const int count = std::min(16, width - x);
        V acc[16];
        for (int p = 0; p < 16; ++p) acc[p] = all(0.0f);
        const auto taps = [&](auto stride, auto n) {
            for (int tap = 0; tap < 9; ++tap)
                for (int b = 0; b < blocks; ++b) {
                    const V wv = load(w + tap * channels + b * BLOCK);
                    const float* a = in.at[tap / 3] + at(x + tap % 3, channels) + b * BLOCK;
#pragma GCC unroll 16
                    for (int p = 0; p < n; ++p) acc[p] = fma(load(a + p * stride), wv, acc[p]);
                }
        };
        if (count == 16 && blocks == 1)
            taps(std::integral_constant<int, BLOCK>{}, std::integral_constant<int, 16>{});
        else if (count == 16)
            taps(channels, std::integral_constant<int, 16>{});
        else
            taps(channels, count);
        float found[16];
        store(found, sums(acc) + all(bias));
        std::copy(found, found + count, out + x);
    }
}

// dw[block][tap][c_in][16] += sum over a row of in(x + tap) outer cot(x).
static void outer_row(const Rows<3>& in, const float* cot, int width, int blocks, float* dw) {
    const int channels = blocks * BLOCK;
    constexpr int HALF = DR_PARTS == 1 ? 16 : DR_PARTS == 2 ? 4 : 2;
    for (int b = 0; b < blocks; ++b)
        for (int tap = 0; tap < 9; ++tap)
            for (int c = 0; c < channels; c += BLOCK, dw += BLOCK * BLOCK) {
                const float* a = in.at[tap / 3] + at(tap % 3, channels) + c;
                const float* g = cot + b * BLOCK;
                for (int h = 0; h < BLOCK; h += HALF) {
                    V acc[HALF];
                    for (int k = 0; k < HALF; ++k) acc[k] = load(dw + (h + k) * BLOCK);
                    for (int x = 0; x < width; ++x) {
                        const V gv = load(g + at(x, channels));
                        const float* ax = a + at(x, channels) + h;
#pragma GCC unroll 16
                        for (int k = 0; k < HALF; ++k) acc[k] = fma(all(ax[k]), gv, acc[k]);
                    }
                    for (int k = 0; k < HALF; ++k) store(dw + (h + k) * BLOCK, acc[k]);
                }
            }
}

// dw[tap][channels] += sum over a row of one(x + tap) many(x).
static void edge_row(const Rows<3>& one, const float* many, int width, int blocks, float* dw) {
    const int channels = blocks * BLOCK;
    for (int b = 0; b < channels; b += BLOCK)
        for (int dy = 0; dy < 3; ++dy) {
            V acc[3];
            for (int dx = 0; dx < 3; ++dx) acc[dx] = load(dw + (dy * 3 + dx) * channels + b);
            for (int x = 0; x < width; ++x) {
                const V m = load(many + at(x, channels) + b);
                for (int dx = 0; dx < 3; ++dx) acc[dx] = fma(all(one.at[dy][x + dx]), m, acc[dx]);
            }
            for (int dx = 0; dx < 3; ++dx) store(dw + (dy * 3 + dx) * channels + b, acc[dx]);
        }
}

// dw[tap][channels] += sum over a row of one(x) many(x + tap).
static void edge_row(const float* one, const Rows<3>& many, int width, int blocks, float* dw) {
    const int channels = blocks * BLOCK;
    for (int b = 0; b < channels; b += BLOCK)
        for (int dy = 0; dy < 3; ++dy) {
            V acc[3];
            for (int dx = 0; dx < 3; ++dx) acc[dx] = load(dw + (dy * 3 + dx) * channels + b);
            const float* m = many.at[dy] + b;
            for (int x = 0; x < width; ++x)
                for (int dx = 0; dx < 3; ++dx) acc[dx] = fma(all(one[x]), load(m + at(x + dx, channels)), acc[dx]);
            for (int dx = 0; dx < 3; ++dx) store(dw + (dy * 3 + dx) * channels + b, acc[dx]);
        }
}

// Filters [C_out, C_in, 3, 3] to the order in which the loops above read them.
static void pack(const float* w, const dr::Layer& layer, bool transpose, dr::Form form, float* packed) {
    // The transpose exchanges the channels and turns the filter about its centre. Filters before a LayerNorm over
    // channels are centred over their outputs: it subtracts that mean anyway, and so need not compute it.
    const int to = transpose ? layer.in : layer.out, from = transpose ? layer.out : layer.in;
    std::vector<double> mean(layer.in * 9, 0.0);
    for (int k = 0; k < layer.out && layer.centred; ++k)
        for (int j = 0; j < layer.in * 9; ++j) mean[j] += w[k * layer.in * 9 + j] / static_cast<double>(layer.out);
    const auto filter = [&](int o, int i, int tap) {
        const int lo = transpose ? i : o, j = (transpose ? o : i) * 9 + (transpose ? 8 - tap : tap);
        return layer.scale * (w[lo * layer.in * 9 + j] - mean[j]);
    };
    const auto padded = [](int n) { return (n + BLOCK - 1) / BLOCK * BLOCK; };
    if (form == dr::Form::reduce) {
        for (int tap = 0; tap < 9; ++tap)
            for (int c = 0; c < padded(from); ++c) *packed++ = c < from ? static_cast<float>(filter(0, c, tap)) : 0.0f;
        return;
    }
    const int sources = form == dr::Form::expand ? 1 : padded(from);
    const int positions = form == dr::Form::winograd ? 16 : 9;
    for (int o = 0; o < padded(to); ++o)
        for (int c = 0; c < sources; ++c) {
            double g[9] = {}, found[16];
            if (o < to && c < from)
                for (int tap = 0; tap < 9; ++tap) g[tap] = filter(o, c, tap);
            std::copy(g, g + 9, found);
            if (form == dr::Form::winograd) {
                constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j) {
                        double s = 0.0;
                        for (int k = 0; k < 3; ++k)
                            for (int l = 0; l < 3; ++l) s += G[i][k] * g[3 * k + l] * G[j][l];
                        found[4 * i + j] = s;
                    }
            }
            for (int p = 0; p < positions; ++p) {
                const std::size_t block = static_cast<std::size_t>(o / BLOCK) * positions * sources;
                const int k = form == dr::Form::winograd ? (p / 4 * sources + c) * 4 + p % 4 : p * sources + c;
                packed[(block + k) * BLOCK + o % BLOCK] = static_cast<float>(found[p]);
            }
        }
}

}  // namespace DR_ISA
