// Layout and products of the conv chain's sweeps in one kernel (docs/kernels.md): a strip of an image moves through rings of
// rows in shared memory, ROWS rows a step.
#pragma once
#include "warp.cuh"

#if defined(__CUDACC__)
#define CHAIN_UNROLL DR_UNROLL
#else
#define CHAIN_UNROLL  // the host compiles faster without
#endif
// The loop over columns of taps: unrolled, a product without LayerNorm takes 1.7 instructions a pixel less, but on other
// architectures it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define CHAIN_COLUMNS DR_UNROLL
#else
#define CHAIN_COLUMNS DR_ROLLED
#endif

// Blocks of 16 columns that a strip has, one for each warp, and rows of a step.
#if !defined(CHAIN_BLOCKS)
#define CHAIN_BLOCKS 12
#endif
constexpr int BLOCKS = CHAIN_BLOCKS, ROWS = 3, COLUMNS = 16 * BLOCKS;

// Shared memory, in bytes. A ring row has 64 bytes a pixel: 16 channels as halves, high and low parts, in four chunks of 16
// bytes; chunk c of pixel p is at c ^ (p / 2 % 4), so that the accesses of a warp are in different banks. Columns -1 and
// COLUMNS are zero.
constexpr int RING = ROWS + 2, RING_ROW = (COLUMNS + 2) * 64;
// Nine numbers a pixel (`scattered`), float32, with columns -1 and COLUMNS.
constexpr int TAPS = 2 * ROWS, TAPS_PITCH = 4 * (COLUMNS + 4), TAPS_ROW = 9 * TAPS_PITCH;
// Images as pairs of halves (x, x + 1) from column -1 on: u high, u low, v high, v low.
constexpr int IMAGE = ROWS + 4, IMAGE_PITCH = 64 * (BLOCKS + 1 + BLOCKS % 2), IMAGE_PLANE = IMAGE * IMAGE_PITCH;
// Packed parameters (backend/gpu/fused_chain.py): fragments of filters, of all channels (W2, its transpose) and of one (W1,
// W3^T, and for scattering W1 and W3); bias, gamma and beta of both layers; numbers.
constexpr int PART = 32 * 16, FRAGMENT = 2 * PART, VECTOR = 64, VECTORS = 2 * 3 * VECTOR, NUMBERS = 24;

constexpr int AT_FORWARD = 0, AT_BACKWARD = AT_FORWARD + RING * RING_ROW, AT_TAPS = AT_BACKWARD + RING * RING_ROW;
constexpr int AT_U = AT_TAPS + TAPS * TAPS_ROW, AT_V = AT_U + 2 * IMAGE_PLANE, AT_PACKED = AT_V + 2 * IMAGE_PLANE;
constexpr int AT_W2 = AT_PACKED, AT_W2T = AT_W2 + 9 * FRAGMENT, AT_W1 = AT_W2T + 9 * FRAGMENT;
constexpr int AT_W3T = AT_W1 + FRAGMENT, AT_S1 = AT_W3T + FRAGMENT, AT_S3 = AT_S1 + FRAGMENT;
constexpr int AT_VECTORS = AT_S3 + FRAGMENT, AT_NUMBERS = AT_VECTORS + VECTORS, SHARED = AT_NUMBERS + 4 * NUMBERS;
constexpr int PACKED = SHARED - AT_PACKED;
static_assert(SHARED <= 232448, "a block has this much shared memory");

// Places of rows in a ring of SIZE rows: rows are counted from the first of an item, and start a little before it.
template <int SIZE, int BYTES>
DR_DEVICE int place_of(int row) {
    return static_cast<int>(static_cast<unsigned>(row + SIZE) % SIZE) * BYTES;
}
template <int SIZE, int BYTES>
DR_DEVICE int next(int place) {
    return place == (SIZE - 1) * BYTES ? 0 : place + BYTES;
}
// What a thread has of 16 neighboring pixels: those at g and g + 8 of the warp's, four channels each. Value k is channel
// 4 t + k % 2 + k / 4 * 2 of pixel g + (k / 2 % 2) * 8: the layout of a product's result, if its column 8 j + 2 t + i is
// channel 4 t + 2 j + i.
struct Lane {
    Index g, t;
    int first;              // column of the warp's first pixel
    Flag in[2], in_ninth[2];  // whether a pixel is in the image; the same for the threads that have tap 8
};
DR_DEVICE constexpr int channel_of(int k) { return k % 2 + k / 4 * 2; }
DR_DEVICE constexpr int pixel_of(int k) { return k / 2 % 2; }

DR_DEVICE Lane lane_of(int warp, int columns) {
    const Index g = lanes() / 4, t = lanes() % 4;
    const int first = 16 * warp;
    const Flag a = g + first < columns, b = g + (first + 8) < columns;
    return {g, t, first, {a, b}, {a && t < 1, b && t < 1}};
}
// The mean over the channels of the products of a and b, of both pixels; `sums` without dividing and adding up lanes.
DR_DEVICE void sums(Float (&s)[2], const Float (&a)[8], const Float (&b)[8]) {
    CHAIN_UNROLL for (int k = 0; k < 8; ++k)
        s[pixel_of(k)] = k == 0 || k == 2 ? a[k] * b[k] : fused(a[k], b[k], s[pixel_of(k)]);
}
DR_DEVICE void mean(Float (&s)[2], const Float (&a)[8], const Float (&b)[8], float part) {
    sums(s, a, b);
    CHAIN_UNROLL for (int n = 0; n < 2; ++n) s[n] = quad_sum(s[n]) * part;
}

// Four numbers for the channels of a thread.
struct Four {
    Float of[4];
};
DR_DEVICE Four four(Shared& shared, int at, const Lane& lane) {
    Word words[4];
    shared.get4(words, lane.t * 16 + at);
    Four four;
    CHAIN_UNROLL for (int n = 0; n < 4; ++n) four.of[n] = float_of(words[n]);
    return four;
}
DR_DEVICE float number(const Shared& shared, int n) { return from_bits(shared.words[AT_NUMBERS / 4 + n]); }
// A thread's four channels of two pixels of a plane [H, W, 16].
struct Pixels {
    Place of[2];
    DR_DEVICE void load(Float (&x)[8], int offset) const {
        Float a[2][4];
        load4(a[0], of[0], offset), load4(a[1], of[1], offset);
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) x[k] = a[pixel_of(k)][channel_of(k)];
    }
};

// Products of parts of halves: low parts first, all in one sum.
DR_DEVICE void product(Float* d, const Word (&high)[4], const Word (&low)[4], const Word (&wh)[4], const Word (&wl)[4]) {
    mma(d, low, wh[0], wh[1]), mma(d + 4, low, wh[2], wh[3]);
    mma(d, high, wl[0], wl[1]), mma(d + 4, high, wl[2], wl[3]);
    mma(d, high, wh[0], wh[1]), mma(d + 4, high, wh[2], wh[3]);
}
DR_DEVICE void zero(Float (&d)[8]) {
    CHAIN_UNROLL for (int k = 0; k < 8; ++k) d[k] = 0.0f;
}
DR_DEVICE void with_fragment(
    Shared& shared, Float (&d)[8], const Word (&high)[4], const Word (&low)[4], int fragment) {
    Word wh[4], wl[4];
    const Index at = lanes() * 16 + fragment;
    shared.get4(wh, at), shared.get4(wl, at + PART);
    product(d, high, low, wh, wl);
}
// A result as the next product's operand.
DR_DEVICE void operand(Word (&high)[4], Word (&low)[4], const Float (&x)[8]) {
    CHAIN_UNROLL for (int n = 0; n < 4; ++n) split(high[n], low[n], x[2 * n], x[2 * n + 1]);
}

// Where a thread finds the windows of its pixels in ROWS rows, the first of which is around `row`: the upper two rows of a
// window (by t), and the lower one.
struct Windows {
    Index upper[ROWS], lower[ROWS];
};
DR_DEVICE Windows windows(int row, const Lane& lane) {
    const Index column = lane.g * 4 + lane.t % 2 * 8 + 4 * lane.first;
    const Flag first = lane.t < 2;
    Windows w;
    int at[ROWS + 2], where = place_of<IMAGE, IMAGE_PITCH>(row - 1);
    CHAIN_UNROLL for (int n = 0; n < ROWS + 2; ++n) {
        at[n] = where;
        where = next<IMAGE, IMAGE_PITCH>(where);
    }
    CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
        w.upper[r] = column + choose(first, Index(at[r]), Index(at[r + 1]));
        w.lower[r] = column + at[r + 2];
    }
    return w;
}
// One channel to all: the windows of 16 pixels (8 pairs, the last two of which have zero weights) times a fragment.
DR_DEVICE void from_image(Shared& shared, Float (&d)[8], int image, const Index& upper, const Index& lower, int fragment) {
    const Word high[4] = {
        shared.get(upper + image), shared.get(upper + (image + 32)), shared.get(lower + image),
        shared.get(lower + (image + 32))};
    const int low_image = image + IMAGE_PLANE;
    const Word low[4] = {
        shared.get(upper + low_image), shared.get(upper + (low_image + 32)), shared.get(lower + low_image),
        shared.get(lower + (low_image + 32))};
    zero(d);
    with_fragment(shared, d, high, low, fragment);
}

// All channels to all: ROWS rows of 16 pixels from ROWS + 2 rows of a ring, the first of which is at `first`. The products
// of a column of taps are one sum, because tensor cores round sums towards zero.
DR_DEVICE void convolve(Shared& shared, Float (&sum)[ROWS][8], int ring, int first, const Lane& lane, int filters) {
    CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) zero(sum[r]);
    int rows[ROWS + 2];
    CHAIN_UNROLL for (int n = 0; n < ROWS + 2; ++n) {
        rows[n] = ring + first;
        first = next<RING, RING_ROW>(first);
    }
    CHAIN_COLUMNS for (int dx = 0; dx < 3; ++dx) {
        Word wh[3][4], wl[3][4];
        CHAIN_UNROLL for (int dy = 0; dy < 3; ++dy) {
            const Index at = lanes() * 16 + (filters + dx * FRAGMENT) + 3 * dy * FRAGMENT;
            shared.get4(wh[dy], at), shared.get4(wl[dy], at + PART);
        }
        const Index pixel = lanes() % 16 + (lane.first + dx);
        const Index high_at = pixel * 64 + (lanes() / 16 ^ (pixel >> 1 & 3)) * 16, low_at = high_at ^ 32;
        Float part[ROWS][8];
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) zero(part[r]);
        CHAIN_UNROLL for (int row = 0; row < ROWS + 2; ++row) {
            Word high[4], low[4];
            shared.matrices(high, high_at + rows[row]), shared.matrices(low, low_at + rows[row]);
            CHAIN_UNROLL for (int dy = 0; dy < 3; ++dy)
                if (row - dy >= 0 && row - dy < ROWS) product(part[row - dy], high, low, wh[dy], wl[dy]);
        }
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r)
            CHAIN_UNROLL for (int k = 0; k < 8; ++k) sum[r][k] = sum[r][k] + part[r][k];
    }
}
// A ring row's pixels of this warp. Those outside the image stay zero. Pixels 8 apart have their chunks in the same order.
DR_DEVICE void put_pixels(
    Shared& shared, int ring_row, const Lane& lane, const Word (&high)[4], const Word (&low)[4]) {
    const Index pixel = lane.g + (lane.first + 1), at = pixel * 64 + lane.t * 4 + (pixel >> 1 & 3) * 16;
    CHAIN_UNROLL for (int n = 0; n < 2; ++n) {
        const int row = ring_row + 512 * n;
        shared.put(at + row, high[n], lane.in[n]), shared.put((at ^ 16) + row, high[2 + n], lane.in[n]);
        shared.put((at ^ 32) + row, low[n], lane.in[n]), shared.put((at ^ 48) + row, low[2 + n], lane.in[n]);
    }
}
