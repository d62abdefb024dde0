// What the stages of the conv chain's sweeps share.
#pragma once
#include "conv_chain_layer.cuh"

// What the stages of all sweeps share, for one item of the launch.
template <bool MEASURE>
struct Stages {
    const Call& call;
    const Piece& piece;
    Shared& shared;
    int start;  // the first row

    DR_DEVICE float at(int n) const { return number(shared, n); }
    DR_DEVICE bool real(int row) const { return start + row >= 0 && start + row < call.height; }
    // The scales of this image's operands, of cotangents with the factor `cotangents`.
    DR_DEVICE void choose_scales(int warp, int guesses, float cotangents) const {
        if (warp) return;
        CHAIN_UNROLL for (int n = 0; n < OPERANDS; ++n) {
            Scale scale;
            scale.up = at(guesses + n) * (call.attempt == MEASURING ? MEASURING_SCALE : 1.0f);
            if (n == GU2 || n == GU1) scale.up *= cotangents;
            if (call.attempt == MEASURED) scale = scale_of(from_bits(call.most[n * call.images + piece.number]));
            const Flag one = lanes() < 1;
            shared.put(AT_NUMBERS + 4 * (SCALES + n), word_of(scale.up), one);
            shared.put(AT_NUMBERS + 4 * (INVERSES + n), word_of(1.0f / scale.up), one);
        }
    }
    // The largest of an operand's values, of pixels that only this item computes.
    DR_DEVICE void measure(int operand, const Float (&x)[8], int row, const Lane& lane) const {
        if constexpr (MEASURE) {
            const bool own = start + row >= piece.row0 && start + row < piece.row1;
            for (int n = 0; n < 2 && own; ++n) {
                const Index column = lane.g + (lane.first + 8 * n);
                const Float most = larger_size(larger_size(x[2 * n], x[2 * n + 1]), larger_size(x[2 * n + 4], x[2 * n + 5]));
                keep_largest(
                    call.most + operand * call.images + piece.number, most * at(INVERSES + operand),
                    column >= piece.from && column < piece.to);
            }
        }
    }
    DR_DEVICE void put_row(int ring_row, const Lane& lane, const Float (&x)[8]) const {
        Word high[4], low[4];
        operand(high, low, x);
        put_pixels(shared, ring_row, lane, high, low);
    }
    DR_DEVICE void put_zeros(int ring_row, const Lane& lane) const {
        const Word zeros[4] = {0u, 0u, 0u, 0u};
        put_pixels(shared, ring_row, lane, zeros, zeros);
    }
    DR_DEVICE void put_zero_taps(int taps, const Lane& lane) const {
        const Index place = taps_place(taps, lane);
        CHAIN_UNROLL for (int k = 0; k < 7; ++k)
            if (k != 5) shared.put(place + tap_of(k), 0u, has_tap(lane, k));
    }
    // u of layer 1, from the image.
    DR_DEVICE void first_layer(Float (&u)[8], const Index& upper, const Index& lower, const Lane& lane) const {
        from_image(shared, u, AT_U, upper, lower, AT_W1);
        const Four bias = four(shared, AT_VECTORS, lane);
        const float unit = at(DOWN_W1) * piece.u.down;
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) u[k] = fused(u[k], unit, bias.of[channel_of(k)]);
    }
    // The pixels of a plane that the thread loads in a row; beyond the image those of the last column.
    DR_DEVICE Pixels pixels(const float* plane, int row, const Lane& lane) const {
        const float* from = plane + (piece.image + static_cast<long long>(start + row) * call.width + piece.column0) * 16;
        const Index g = lane.g + lane.first, h = lane.g + (lane.first + 8);
        const int last = piece.columns - 1;
        return {{place(from, lesser(g, last) * 16 + lane.t * 4), place(from, lesser(h, last) * 16 + lane.t * 4)}};
    }
    // The nine numbers of the pixels: taps 2 t and 2 t + 1, and 8 if t = 0. Their unit is that of stage B's products.
    template <bool ADD>
    DR_DEVICE void scatter(
        int taps, const Lane& lane, const Word (&high)[4], const Word (&low)[4], int fragment, float unit) const {
        Float d[8];
        zero(d);
        with_fragment(shared, d, high, low, fragment);
        const Index place = taps_place(taps, lane);
        CHAIN_UNROLL for (int k = 0; k < 7; ++k) {
            if (k == 5) continue;
            const Flag own = has_tap(lane, k);
            const Index at = place + tap_of(k);
            const Float sum = ADD ? fused(d[k], unit, float_of(shared.get(at, own))) : d[k];
            shared.put(at, word_of(sum), own);
        }
    }
    DR_DEVICE static Index taps_place(int taps, const Lane& lane) {
        return lane.g * 4 + lane.t * (2 * TAPS_PITCH) + (AT_TAPS + 4 * lane.first + 4 + taps);
    }
    DR_DEVICE static constexpr int tap_of(int k) { return (k < 4 ? k % 2 : 8) * TAPS_PITCH + pixel_of(k) * 32; }
    DR_DEVICE static Flag has_tap(const Lane& lane, int k) {
        return k < 4 ? lane.in[pixel_of(k)] : lane.in_ninth[pixel_of(k)];
    }
    // Rows of (1 + alpha) image + offset + down times the sums of nine numbers, a warp's own columns.
    DR_DEVICE void finish(const float* image, float offset, float down, int row, int warp) const {
        const Index half = lanes() / 16, x = lanes() % 16 + 16 * warp;
        const Flag inside = x >= piece.from && x < piece.to;
        const float* pixels = image + piece.image + piece.column0;
        float* out = call.out + piece.image + piece.column0;
        CHAIN_UNROLL for (int i = 0; i < (ROWS + 1) / 2; ++i) {
            const Index r = half + 2 * i, y = r + (start + row);
            const Flag own = inside && r < ROWS && y >= piece.row0 && y < piece.row1;
            Float sum = 0.0f;
            Index at = r * TAPS_ROW + place_of<TAPS, TAPS_ROW>(row - 1);
            CHAIN_UNROLL for (int dy = 0; dy < 3; ++dy) {
                at = choose(at < TAPS * TAPS_ROW, at, at - TAPS * TAPS_ROW);
                const Index line = x * 4 + at;
                CHAIN_UNROLL for (int dx = 0; dx < 3; ++dx)
                    sum = sum + float_of(shared.get(line + (AT_TAPS + (3 * dy + dx) * TAPS_PITCH + 4 * dx), own));
                at = at + TAPS_ROW;
            }
            const Index pixel = y * call.width + x;
            const Float result = fused(sum, down, fused(load(pixels, pixel, own), 1.0f + call.alpha, offset));
            store(out, pixel, result, own);
            if (call.attempt == GUESSED && any_lane(own && !is_finite(result))) call.failed[piece.number] = 1;
        }
    }
};
