// Memory layout of a band of an image during a sweep.
//
// A tile is two rows by two columns; a register holds the same pixel of LANES neighboring tiles, of one channel. So a row
// of a channel is two lines, its even and its odd columns, and no sweep ever sums over lanes.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "aligned.h"
#include "simd.h"

namespace DR_ISA {

using std::size_t;

// Registers of tiles that a loop processes at once, a piece: all data of a piece stays in the L1 cache.
constexpr int MAX_PIECE = 3;

// Images with more columns are processed in strips.
constexpr int MAX_COLUMNS = 400;

struct Layout {
    int width, channels;
    int tiles, vectors;  // in a row; registers that hold them
    size_t line;         // floats from one line of a row to the next; a register of zeros lies between them

    Layout(int width_, int channels_)
        : width(width_), channels(channels_), tiles((width + 1) / 2), vectors((tiles + LANES - 1) / LANES),
          line(static_cast<size_t>(vectors + 1) * LANES) {
        // Lines a multiple of 256 bytes apart would share few sets of the L1 cache.
        if (line % 64 == 0) line += LANES;
    }
    // Floats of a pair of rows in a pointwise stage: piece by piece, each [row][channel][parity][register][lane].
    size_t block(int of) const { return static_cast<size_t>(of) * 4 * vectors * LANES; }
    size_t block() const { return block(channels); }
    // Offset in it of the piece that begins at register v0.
    size_t piece(int of, int v0) const { return static_cast<size_t>(of) * 4 * v0 * LANES; }
    size_t piece(int v0) const { return piece(channels, v0); }
};

// Call body(v0, n) for the pieces of a row: n <= MAX_PIECE registers starting at v0.
template <class F>
static DR_INLINE void for_pieces(const Layout& y, F body) {
    const int count = (y.vectors + MAX_PIECE - 1) / MAX_PIECE;
    for (int k = 0; k < count; ++k) {
        const int v0 = y.vectors * k / count;
        body(v0, y.vectors * (k + 1) / count - v0);
    }
}
// The same with n as a constant: body(v0, integral_constant<N>).
template <class F>
static DR_INLINE void for_constant_pieces(const Layout& y, F body) {
    for_pieces(y, [&](int v0, int n) DR_LAMBDA {
        if (n == 1) body(v0, std::integral_constant<int, 1>{});
        if constexpr (MAX_PIECE >= 2)
            if (n == 2) body(v0, std::integral_constant<int, 2>{});
        if constexpr (MAX_PIECE >= 3)
            if (n == 3) body(v0, std::integral_constant<int, 3>{});
    });
}

// For row k of the pair and each channel and register of a piece: body(channel, q, in_piece, in_lines), with q = N parity
// + register and the offsets in a piece and in a row of lines.
template <int N, class F>
static DR_INLINE void for_registers(const Layout& y, int k, int v0, F body) {
    for (int c = 0; c < y.channels; ++c)
#pragma GCC unroll 6
        for (int q = 0; q < 2 * N; ++q)
            body(c, q, static_cast<size_t>((k * y.channels + c) * 2 * N + q) * LANES,
                 (2 * c + q / N) * y.line + static_cast<size_t>(v0 + q % N) * LANES);
}

// The same for bodies whose values do not stay in registers, in a loop that is not unrolled: body(channel, q, in_piece,
// in_lines).
template <int N, class F>
static DR_INLINE void for_registers_rolled(const Layout& y, int k, int v0, F body) {
    size_t o = static_cast<size_t>(k) * y.channels * 2 * N * LANES;
    for (int c = 0; c < y.channels; ++c)
#pragma GCC unroll 1
        for (int q = 0; q < 2 * N; ++q, o += LANES) {
            const int parity = q < N ? 0 : 1;
            body(c, q, o, (2 * c + parity) * y.line + static_cast<size_t>(v0 + q - parity * N) * LANES);
        }
}

// The means over the channels of f(channel, q, in_piece, in_lines).
template <int N, class F>
static DR_INLINE void channel_means(const Layout& y, int k, int v0, Vec (&mean)[2 * N], F f) {
    for (Vec& m : mean) m = broadcast(0.0f);
    for_registers<N>(y, k, v0, [&](int c, int q, size_t o, size_t at) { mean[q] += f(c, q, o, at); });
    for (Vec& m : mean) m *= 1.0f / y.channels;
}

// Four rows around a pair, or a row and its neighbors: pointers to their first lines.
struct Rows {
    const float* at[4];
};

// The most recent rows of an image, as far as convolutions still read them. Rows outside the image are zeros.
class Ring {
  public:
    Ring(int size, const Layout& y, int channels, int height)
        : size_(size), height_(height), lines_(2 * channels), line_(y.line), last_((y.vectors - 1) * LANES),
          stride_(lines_ * y.line + LANES), data_(stride_ * (size + 1), 0.0f) {
        for (int j = 0; j < LANES; ++j) {
            const int tile = (y.vectors - 1) * LANES + j;
            mask_[0][j] = tile < y.tiles ? -1 : 0;
            mask_[1][j] = tile < y.width / 2 ? -1 : 0;
        }
    }
    float* row(int r) { return data_.data() + stride_ * (r < size_ ? r : r % size_) + LANES; }
    Rows around(int r) const { return {{padded(r - 1), padded(r), padded(r + 1), padded(r + 2)}}; }
    // Write zeros to the right of the image's last column, for the convolutions.
    void trim(int r) {
        float* p = row(r) + last_;
        for (int k = 0; k < lines_; ++k, p += line_) store(p, masked(load(p), mask_[k % 2]));
    }

  private:
    const float* padded(int r) const {
        return data_.data() + stride_ * (r < 0 || r >= height_ ? size_ : r % size_) + LANES;
    }

    int size_, height_, lines_;
    size_t line_, last_, stride_;
    IntVec mask_[2];
    Floats data_;
};

// Blocks of the most recent pairs of rows, for pointwise stages.
class Pairs {
  public:
    Pairs(int size, size_t block) : size_(size), block_(block), data_(size * block, 0.0f) {}
    float* at(int pair) { return data_.data() + block_ * (pair < size_ ? pair : pair % size_); }  // a division takes longer

  private:
    int size_;
    size_t block_;
    Floats data_;
};

// Columns [first, last) of an image, processed as a separate image that extends from `begin` to `end`: by the reach of a
// sweep's stages, so that the columns' bits do not depend on the strip.
struct Strip {
    int first, last, begin, end;
    int width() const { return end - begin; }
};

// Cut wide images so that a sweep's rows stay in the L2 cache and the fewest columns are repeated.
static std::vector<Strip> strips(int width, int reach) {
    const auto cut = [&](int n) {
        std::vector<Strip> found;
        for (int k = 0; k < n; ++k) {
            const int first = 2 * (width / 2 * k / n), last = k == n - 1 ? width : 2 * (width / 2 * (k + 1) / n);
            found.push_back({first, last, std::max(0, first - reach), std::min(width, last + reach)});
        }
        return found;
    };
    const int least = (width + MAX_COLUMNS - 1) / MAX_COLUMNS;
    std::vector<Strip> best;
    size_t cost = 0;
    for (int n = least; n <= (least > 1 ? least + 3 : 1); ++n) {
        std::vector<Strip> found = cut(n);
        size_t sum = 0;
        for (const Strip& s : found) sum += Layout(s.width(), 1).vectors;
        if (best.empty() || sum < cost) best = found, cost = sum;
    }
    return best;
}

}  // namespace DR_ISA
