// The stages of the Hessian-vector product: A makes a1'; B z2', gu2', and the nine numbers of h'; C gu1', and its nine
// numbers; D the output. A prime, or a trailing 1, marks derivatives along v.
#pragma once
#include "conv_chain_layer.cuh"

// One item of the launch.
template <bool NORM, bool MEASURE>
struct Product {
    const Call& call;
    const Piece& piece;
    Shared& shared;
    int start;  // the first row

    DR_DEVICE float at(int n) const { return number(shared, n); }
    DR_DEVICE bool real(int row) const { return start + row >= 0 && start + row < call.height; }
    // The scales of this image's operands.
    DR_DEVICE void choose_scales(int warp) const {
        if (warp) return;
        CHAIN_UNROLL for (int n = 0; n < OPERANDS; ++n) {
            Scale scale;
            scale.up = at(GUESSES + n) * (call.attempt == MEASURING ? MEASURING_SCALE : 1.0f);
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
    // u and u' of layer 1: from the images.
    DR_DEVICE void first_layer(Float (&u)[8], Float (&u1)[8], const Index& upper, const Index& lower, const Lane& lane) const {
        from_image(shared, u1, AT_V, upper, lower, AT_W1);
        from_image(shared, u, AT_U, upper, lower, AT_W1);
        const Four bias = four(shared, AT_VECTORS, lane);
        const float unit = at(DOWN_W1) * piece.u.down;
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) u[k] = fused(u[k], unit, bias.of[channel_of(k)]);
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
    // a1' of rows.
    DR_DEVICE void stage_a(int row, const Lane& lane) const {
        const Windows w = windows(row, lane);
        const Units units = {at(DOWN_W1), 0.0f, 0.0f, at(SCALES + A1), 0.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS, units);
        int where = place_of<RING, RING_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (real(row + r)) {
                Float u[8], u1[8];
                first_layer(u, u1, w.upper[r], w.lower[r], lane);
                layer.forward(u, u1);
                measure(A1, u1, row + r, lane);
                put_row(AT_FORWARD + where, lane, u1);
            } else {
                put_zeros(AT_FORWARD + where, lane);
            }
            where = next<RING, RING_ROW>(where);
        }
    }
    // The pixels of a plane that the thread loads in a row; beyond the image those of the last column.
    DR_DEVICE Pixels pixels(const float* plane, int row, const Lane& lane) const {
        const float* from = plane + (piece.image + static_cast<long long>(start + row) * call.width + piece.column0) * 16;
        const Index g = lane.g + lane.first, h = lane.g + (lane.first + 8);
        const int last = piece.columns - 1;
        return {{place(from, lesser(g, last) * 16 + lane.t * 4), place(from, lesser(h, last) * 16 + lane.t * 4)}};
    }
    // gu2' of rows, and the nine numbers <a2', W3_t>.
    DR_DEVICE void stage_b(int row, const Lane& lane) const {
        Float sum[ROWS][8];
        convolve(shared, sum, AT_FORWARD, place_of<RING, RING_ROW>(row - 1), lane, AT_W2);
        const float down = at(DOWN_W3);
        const Units units = {
            at(DOWN_W2) * at(INVERSES + A1), piece.u.down, down * at(SCALES + GU2), at(SCALES + A2), at(INVERSES + A2)};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS + 3 * VECTOR, units);
        const Windows w = windows(row, lane);
        const Pixels z = pixels(call.z, row, lane);
        int where = place_of<RING, RING_ROW>(row), taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            const int ring_row = AT_BACKWARD + where;
            if (real(row + r)) {
                Float u[8], g[8], g1[8], a1[8];
                Word high[4], low[4];
                z.load(u, r * 16 * call.width);
                from_image(shared, g, AT_U, w.upper[r], w.lower[r], AT_W3T);
                from_image(shared, g1, AT_V, w.upper[r], w.lower[r], AT_W3T);
                layer.both(u, sum[r], g, g1, a1);
                measure(GU2, g1, row + r, lane), measure(A2, a1, row + r, lane);
                put_row(ring_row, lane, g1);
                operand(high, low, a1);
                scatter<false>(taps, lane, high, low, AT_S3, 0.0f);
            } else {
                put_zeros(ring_row, lane);
                const Index place = taps_place(taps, lane);
                CHAIN_UNROLL for (int k = 0; k < 7; ++k)
                    if (k != 5) shared.put(place + tap_of(k), 0u, has_tap(lane, k));
            }
            where = next<RING, RING_ROW>(where), taps = next<TAPS, TAPS_ROW>(taps);
        }
    }
    // gu1' of rows, and <gu1', W1_t> added to the nine numbers.
    DR_DEVICE void stage_c(int row, const Lane& lane) const {
        Float sum[ROWS][8];
        convolve(shared, sum, AT_BACKWARD, place_of<RING, RING_ROW>(row - 1), lane, AT_W2T);
        const float down = at(DOWN_W2) * at(INVERSES + GU2);
        const float unit = at(DOWN_W1) * at(INVERSES + GU1) * (at(UP_W3) * at(SCALES + A2));
        const Units units = {at(DOWN_W1), at(UP_W2) * at(SCALES + GU2), down * at(SCALES + GU1), 1.0f, 1.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS, units);
        const Windows w = windows(row, lane);
        const Pixels saved = pixels(call.g, row, lane);
        int taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (real(row + r)) {
                Float u[8], u1[8], g[8], a1[8];
                saved.load(g, r * 16 * call.width);
                first_layer(u, u1, w.upper[r], w.lower[r], lane);
                layer.both(u, u1, g, sum[r], a1);
                measure(GU1, sum[r], row + r, lane);
                Word high[4], low[4];
                operand(high, low, sum[r]);
                scatter<true>(taps, lane, high, low, AT_S1, unit);
            }
            taps = next<TAPS, TAPS_ROW>(taps);
        }
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
    // The product's rows, a warp's own columns.
    DR_DEVICE void stage_d(int row, int warp) const {
        const Index half = lanes() / 16, x = lanes() % 16 + 16 * warp;
        const Flag inside = x >= piece.from && x < piece.to;
        const float* v = call.v + piece.image + piece.column0;
        float* out = call.out + piece.image + piece.column0;
        const float down = piece.v.down * (at(DOWN_W3) * at(INVERSES + A2));
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
            const Float result = fused(sum, down, load(v, pixel, own) * (1.0f + call.alpha));
            store(out, pixel, result, own);
            if (call.attempt == GUESSED && any_lane(own && !is_finite(result))) call.failed[piece.number] = 1;
        }
    }
};
