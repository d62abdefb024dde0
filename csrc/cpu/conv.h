// 3 x 3 convolutions of pairs of rows, one piece at a time: the innermost loops of a sweep.
//
// Included once per instruction set (DR_ISA names it). A piece is N or n registers of tiles starting at v0 (N, a constant, if
// the sums stay in registers); the layout of `raw` and `cot` is [row][channel][parity][register][lane] (layout.h).
#pragma once
#include <vector>

#include "conv_chain.h"
#include "layout.h"

namespace DR_ISA {

// The four columns of a tile and its neighbors, in four rows around a pair: [row][2 t - 1, 2 t, 2 t + 1, 2 t + 2].
struct Patch {
    Vec d[4][4];
    DR_INLINE Patch(const Rows& in, size_t even_line, size_t line) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float *e = in.at[i] + even_line, *o = e + line;
            d[i][0] = load(o - 1), d[i][1] = load(e), d[i][2] = load(o), d[i][3] = load(e + 1);
        }
    }
};

// One channel to all: filters [channel][9].
static DR_CALL void conv_from_one(const Rows& in, int v0, int n, const Layout& y, const float* w, const float* bias,
                                  float* raw) {
    const size_t row = static_cast<size_t>(y.channels) * 2 * n * LANES;
    for (int v = 0; v < n; ++v) {
        const Patch p(in, static_cast<size_t>(v0 + v) * LANES, y.line);
        const float* f = w;
        float* out = raw + v * LANES;
        for (int c = 0; c < y.channels; ++c, f += 9, out += 2 * n * LANES) {
            const Vec start = broadcast(bias ? bias[c] : 0.0f);
            Vec acc[2][2] = {{start, start}, {start, start}};
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; ++tap) {
                const Vec wv = broadcast(f[tap]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) acc[k / 2][k % 2] += wv * p.d[k / 2 + tap / 3][k % 2 + tap % 3];
            }
            for (int k = 0; k < 4; ++k) store(out + (k / 2 * row + k % 2 * n * LANES), acc[k / 2][k % 2]);
        }
    }
}

// All channels to one: filters [channel][9]; out [row][parity][register][lane], rows `row` floats apart.
static DR_CALL void conv_to_one(const Rows& in, int v0, int n, const Layout& y, const float* w, float bias,
                                float* out, size_t row) {
    for (int v = 0; v < n; ++v) {
        // One sum for each row of the filter: twelve sums keep the units busy.
        Vec acc[3][4] = {};
        const float* f = w;
        size_t line = static_cast<size_t>(v0 + v) * LANES;
        for (int c = 0; c < y.channels; ++c, f += 9, line += 2 * y.line) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const float *e = in.at[i] + line, *o = e + y.line;
                const Vec d[4] = {load(o - 1), load(e), load(o), load(e + 1)};
#pragma GCC unroll 3
                for (int dx = 0; dx < 3; ++dx)
#pragma GCC unroll 2
                    for (int parity = 0; parity < 2; ++parity) {
                        if (i < 3) acc[i][parity] += broadcast(f[3 * i + dx]) * d[parity + dx];
                        if (i > 0) acc[i - 1][2 + parity] += broadcast(f[3 * (i - 1) + dx]) * d[parity + dx];
                    }
            }
        }
        for (int k = 0; k < 4; ++k)
            store(out + k / 2 * row + (k % 2 * n + v) * LANES, acc[0][k] + acc[1][k] + acc[2][k] + bias);
    }
}

// All channels to all, as direct sums: filters [out][in][9].
static DR_CALL void conv_direct(const Rows& in, int v0, int n, const Layout& y, const float* w, const float* bias, float* raw) {
    for (int c = 0; c < y.channels; ++c)
        conv_to_one(in, v0, n, y, w + static_cast<size_t>(c) * y.channels * 9, bias ? bias[c] : 0.0f,
                    raw + static_cast<size_t>(c) * 2 * n * LANES, static_cast<size_t>(y.channels) * 2 * n * LANES);
}

// Winograd's F(2 x 2, 3 x 3): 16 products for 4 pixels instead of the direct sum's 36 (Lavin and Gray 2016).
// Row I of the 4 x 4 transformed patches, of all channels: u[4][channel][register][lane].
template <int I>
static DR_INLINE Vec combine_rows(const Rows& in, std::ptrdiff_t o) {
    constexpr int A = I == 0 ? 0 : I == 2 ? 2 : 1, B = I == 2 ? 1 : I == 3 ? 3 : 2;
    const Vec a = load(in.at[A] + o), b = load(in.at[B] + o);
    return I == 1 ? a + b : a - b;
}
template <int N, int I>
static DR_INLINE void transform_input(const Rows& in, int v0, const Layout& y, float* u) {
    const size_t next = static_cast<size_t>(y.channels) * N * LANES;
    std::ptrdiff_t line = static_cast<std::ptrdiff_t>(v0) * LANES;
    for (int c = 0; c < y.channels; ++c, line += 2 * y.line) {
        const std::ptrdiff_t odd_line = line + y.line;
        Vec e = combine_rows<I>(in, line), o = combine_rows<I>(in, odd_line - LANES);
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v, u += LANES) {
            const Vec right = combine_rows<I>(in, line + (v + 1) * LANES), here = combine_rows<I>(in, odd_line + v * LANES);
            store(u, previous_lanes(o, here) - here);
            store(u + next, e + here);
            store(u + 2 * next, here - e);
            store(u + 3 * next, e - next_lanes(e, right));
            e = right, o = here;
        }
    }
}

// Outputs summed at once; outputs whose filters are contiguous.
constexpr int OUTPUTS = LANES == 16 ? 8 : 4;
constexpr int FILTER_GROUP = 8;

// One position of all tiles of a piece: filters [in][FILTER_GROUP].
template <int N>
static DR_INLINE void multiply_tiles(const float* u, int channels, const float* w, Vec (&sum)[OUTPUTS][N]) {
    Vec acc[OUTPUTS][N] = {};
    for (int c = 0; c < channels; ++c, u += N * LANES, w += FILTER_GROUP) {
        Vec d[N];
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) d[v] = load(u + v * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; ++o) {
            const Vec wv = broadcast(w[o]);
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) acc[o][v] += wv * d[v];
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTPUTS; ++o)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) sum[o][v] = acc[o][v];
}

// Add row I of the products to an output's two rows, after the sum over its positions.
template <int I>
static DR_INLINE void transform_output(Vec s, Vec start, float* top, float* bottom) {
    if (I == 0) store(top, s + start);
    if (I == 1) store(top, load(top) + s), store(bottom, s + start);
    if (I == 2) store(top, load(top) + s), store(bottom, load(bottom) - s);
    if (I == 3) store(bottom, load(bottom) - s);
}

template <int N, int I>
static DR_INLINE void winograd_row(const Rows& in, int v0, const Layout& y, const float* w, const float* bias, float* u,
                                   float* raw) {
    const int channels = y.channels;
    const size_t row = static_cast<size_t>(channels) * 2 * N * LANES, next = static_cast<size_t>(channels) * N * LANES;
    transform_input<N, I>(in, v0, y, u);
    for (int g = 0; g < channels; g += OUTPUTS) {
        const float* f = w + static_cast<size_t>(g / FILTER_GROUP) * 4 * channels * FILTER_GROUP + g % FILTER_GROUP;
        Vec m[4][OUTPUTS][N];
        for (int j = 0; j < 4; ++j, f += channels * FILTER_GROUP) multiply_tiles<N>(u + j * next, channels, f, m[j]);
        for (int o = 0; o < std::min(OUTPUTS, channels - g); ++o) {
            const Vec start = broadcast(bias ? bias[g + o] : 0.0f);
            float* to = raw + static_cast<size_t>(g + o) * 2 * N * LANES;
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v, to += LANES) {
                transform_output<I>(m[0][o][v] + m[1][o][v] + m[2][o][v], start, to, to + row);
                transform_output<I>(m[1][o][v] - m[2][o][v] - m[3][o][v], start, to + N * LANES, to + row + N * LANES);
            }
        }
    }
}

// All channels to all: filters [4][out / FILTER_GROUP][4][in][FILTER_GROUP]; `u` holds 4 channels N registers.
template <int N>
static DR_CALL void conv_winograd(const Rows& in, int v0, const Layout& y, const float* w, const float* bias, float* u,
                                  float* raw) {
    const size_t row = static_cast<size_t>((y.channels + FILTER_GROUP - 1) / FILTER_GROUP * FILTER_GROUP) * y.channels * 4;
    winograd_row<N, 0>(in, v0, y, w, bias, u, raw);
    winograd_row<N, 1>(in, v0, y, w + row, bias, u, raw);
    winograd_row<N, 2>(in, v0, y, w + 2 * row, bias, u, raw);
    winograd_row<N, 3>(in, v0, y, w + 3 * row, bias, u, raw);
}
static DR_INLINE void conv_winograd(const Rows& in, int v0, int n, const Layout& y, const float* w, const float* bias, float* u,
                               float* raw) {
    if (n == 1) conv_winograd<1>(in, v0, y, w, bias, u, raw);
    if (n == 2) conv_winograd<2>(in, v0, y, w, bias, u, raw);
    if (n == 3) conv_winograd<3>(in, v0, y, w, bias, u, raw);
}

// Reorder filters [C_out, C_in, 3, 3] for the loops above.
static void pack(const float* w, const dr::Layer& layer, bool transpose, dr::FilterLayout layout, float* packed) {
    // The transpose exchanges the channels and rotates the filter by half a turn. Filters before a LayerNorm over
    // channels are centered over their outputs: the LayerNorm subtracts this mean, and then need not compute it.
    const int to = transpose ? layer.in : layer.out, from = transpose ? layer.out : layer.in;
    std::vector<double> mean(layer.in * 9, 0.0);
    for (int k = 0; k < layer.out && layer.centered; ++k)
        for (int j = 0; j < layer.in * 9; ++j) mean[j] += w[k * layer.in * 9 + j] / static_cast<double>(layer.out);
    const auto filter = [&](int o, int i, int tap) {
        const int lo = transpose ? i : o, j = (transpose ? o : i) * 9 + (transpose ? 8 - tap : tap);
        return layer.scale * (w[lo * layer.in * 9 + j] - mean[j]);
    };
    const size_t groups = static_cast<size_t>((to + FILTER_GROUP - 1) / FILTER_GROUP);
    for (int o = 0; o < to; ++o)
        for (int i = 0; i < from; ++i) {
            if (layout == dr::FilterLayout::direct) {
                for (int tap = 0; tap < 9; ++tap) *packed++ = static_cast<float>(filter(o, i, tap));
                continue;
            }
            constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
            for (int a = 0; a < 4; ++a)
                for (int b = 0; b < 4; ++b) {
                    double s = 0.0;
                    for (int tap = 0; tap < 9; ++tap) s += G[a][tap / 3] * G[b][tap % 3] * filter(o, i, tap);
                    const size_t group = a * groups + o / FILTER_GROUP;
                    packed[((group * 4 + b) * from + i) * FILTER_GROUP + o % FILTER_GROUP] = static_cast<float>(s);
                }
        }
}

}  // namespace DR_ISA
