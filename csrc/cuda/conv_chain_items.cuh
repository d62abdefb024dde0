// The launch of a sweep: its arguments, strips and bands of images, scales, and the rows of images that a step reads.
//
// Operands of products are halves, so each has a scale, a power of two. v is scaled for every image to a maximum in [32, 64).
// The scales of a1', gu2', a2', gu1' are guesses from the parameters. If a number of an image overflows, so that the product
// is not finite, two more launches repeat the image: one measures the operands at small scales, one uses what it measured.
#pragma once
#include "conv_chain.cuh"

// Numbers among the packed parameters: the inverse scales of filters, the scales of W2 and W3, the last bias, and the guesses
// of the operands' scales, for products and for gradients; then the scales of an item and their inverses.
enum Operand { A1, GU2, A2, GU1, OPERANDS };
enum Number {
    DOWN_W1, DOWN_W2, DOWN_W3, UP_W2, UP_W3, LAST_BIAS,
    GUESSES, GRADIENT_GUESSES = GUESSES + OPERANDS, SCALES = GRADIENT_GUESSES + OPERANDS, INVERSES = SCALES + OPERANDS
};
static_assert(INVERSES + OPERANDS <= NUMBERS, "numbers");
enum Attempt { GUESSED, MEASURING, MEASURED };
constexpr float MEASURING_SCALE = 1.0f / 65536;
constexpr int REACH = 3;  // columns and rows that the gradient of a pixel reaches, less the one of the image

struct Call {
    const float *u, *v, *z, *g;  // images [B, H, W]; planes [B, H, W, 16] of layers 2 and 1
    float* out;
    const float *u_max, *v_max;   // [B], largest absolute values
    const unsigned char* active;  // [B] or null
    unsigned *failed, *most;      // [B], whether an image's product is not finite; [4, B], the operands' largest values
    const unsigned* packed;
    float alpha, eps, part;  // part: 1 / channels
    int height, width, images, bands, attempt;
    // Of a gradient: planes to save, or null; [B, rows, strips, BLOCKS], the energy of 16 pixels.
    float *z_out, *g_out;
    double* energies;

    DR_DEVICE int strips() const { return width <= COLUMNS ? 1 : 1 + (width - COLUMNS + OUTPUTS - 1) / OUTPUTS; }
    static constexpr int OUTPUTS = COLUMNS - 2 * REACH;
};

// Half scales of images: a power of two that puts a maximum into [32, 64), and its inverse.
struct Scale {
    float up, down;
};
DR_DEVICE Scale scale_of(float most) {
    const unsigned exponent = bits_of(most) >> 23 & 255u;
    const unsigned clamped = exponent == 255u ? 132u : exponent < 6u ? 6u : exponent;
    return {from_bits((259u - clamped) << 23), from_bits((clamped - 5u) << 23)};
}

// A strip and a band of an image: outputs of rows [row0, row1) and columns [from, to), counted from column0.
struct Piece {
    long long image;  // its first pixel
    int number, strip, row0, row1, column0, columns, from, to;
    Scale u, v;
};
DR_DEVICE bool find(const Call& call, int item, Piece& piece) {
    const int strips = call.strips(), strip = item % strips, band = item / strips % call.bands;
    piece.number = item / strips / call.bands, piece.strip = strip;
    if (call.active && !call.active[piece.number]) return false;
    if (call.attempt != GUESSED && !call.failed[piece.number]) return false;
    piece.image = static_cast<long long>(piece.number) * call.height * call.width;
    piece.row0 = static_cast<int>(static_cast<long long>(call.height) * band / call.bands);
    piece.row1 = static_cast<int>(static_cast<long long>(call.height) * (band + 1) / call.bands);
    const bool last = strip == strips - 1;
    piece.column0 = strips == 1 ? 0 : last ? call.width - COLUMNS : strip * Call::OUTPUTS;
    piece.columns = call.width < COLUMNS ? call.width : COLUMNS;
    // A strip's outputs start where those of the strip before end.
    const int start = strip == 0 ? 0 : strip * Call::OUTPUTS + REACH;
    piece.from = start - piece.column0;
    piece.to = last ? piece.columns : COLUMNS - REACH;
    piece.u = scale_of(call.u_max[piece.number]), piece.v = scale_of(call.v_max ? call.v_max[piece.number] : 0.0f);
    return true;
}

// Rows of u, and of v if PICTURES is 2, as pairs of halves, zero outside the image; a warp's own columns, and those beyond the last warp's.
// `row` counts from `start`, the item's first; COUNT is odd, so half a warp is free for the last two columns.
template <int COUNT, int PICTURES>
DR_DEVICE void read_images(const Call& call, const Piece& piece, Shared& shared, int warp, int start, int row) {
    const Index half = lanes() / 16, within = lanes() % 16;
    CHAIN_UNROLL for (int i = 0; i < (COUNT + 1) / 2; ++i) {
        const bool odd = 2 * i + 1 == COUNT;  // the free half
        const Flag beyond = half * (odd && warp == BLOCKS - 1 ? 1 : 0) >= 1;
        const Index r = choose(beyond, within / 2, half + 2 * i) + row;
        const Index x = choose(beyond, within % 2 + COLUMNS, within + 16 * warp);
        const Index y = r + start, column = x + (piece.column0 - 1);
        const Flag own = r < row + COUNT, real = own && y >= 0 && y < call.height;
        const Flag first = real && column >= 0 && column < call.width;
        const Flag second = real && column >= -1 && column < call.width - 1;
        const Index from = y * call.width + column;
        const Index at = r % IMAGE * IMAGE_PITCH + x * 4 + AT_U;
        CHAIN_UNROLL for (int n = 0; n < PICTURES; ++n) {
            const float* image = (n ? call.v : call.u) + piece.image;
            const float scale = n ? piece.v.up : piece.u.up;
            const Float a = load(image, from, first) * scale, b = load(image, from + 1, second) * scale;
            Word high, low;
            split(high, low, a, b);
            shared.put(at + n * 2 * IMAGE_PLANE, high, own);
            shared.put(at + (n * 2 * IMAGE_PLANE + IMAGE_PLANE), low, own);
        }
    }
}
