// The stages of the Hessian-vector product: A makes a1'; B z2', gu2', and the nine numbers of h'; C gu1', and its nine
// numbers; D the output. A prime, or a trailing 1, marks derivatives along v.
#pragma once
#include "conv_chain_stages.cuh"

template <bool NORM, bool MEASURE>
struct Product : Stages<MEASURE> {
    static constexpr int FIRST_GUESS = GUESSES, PICTURES = 2;
    using Base = Stages<MEASURE>;
    using Base::at, Base::call, Base::piece, Base::shared;

    DR_DEVICE float cotangents() const { return 1.0f; }

    // a1' of rows.
    DR_DEVICE void stage_a(int row, const Lane& lane) const {
        const Windows w = windows(row, lane);
        const Units units = {at(DOWN_W1), 0.0f, 0.0f, at(SCALES + A1), 0.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS, units);
        int where = place_of<RING, RING_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (this->real(row + r)) {
                Float u[8], u1[8];
                from_image(shared, u1, AT_V, w.upper[r], w.lower[r], AT_W1);
                this->first_layer(u, w.upper[r], w.lower[r], lane);
                layer.forward(u, u1);
                this->measure(A1, u1, row + r, lane);
                this->put_row(AT_FORWARD + where, lane, u1);
            } else {
                this->put_zeros(AT_FORWARD + where, lane);
            }
            where = next<RING, RING_ROW>(where);
        }
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
        const Pixels z = this->pixels(call.z, row, lane);
        int where = place_of<RING, RING_ROW>(row), taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            const int ring_row = AT_BACKWARD + where;
            if (this->real(row + r)) {
                Float u[8], g[8], g1[8], a1[8];
                Word high[4], low[4];
                z.load(u, r * 16 * call.width);
                from_image(shared, g, AT_U, w.upper[r], w.lower[r], AT_W3T);
                from_image(shared, g1, AT_V, w.upper[r], w.lower[r], AT_W3T);
                layer.both(u, sum[r], g, g1, a1);
                this->measure(GU2, g1, row + r, lane), this->measure(A2, a1, row + r, lane);
                this->put_row(ring_row, lane, g1);
                operand(high, low, a1);
                this->template scatter<false>(taps, lane, high, low, AT_S3, 0.0f);
            } else {
                this->put_zeros(ring_row, lane);
                this->put_zero_taps(taps, lane);
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
        const Pixels saved = this->pixels(call.g, row, lane);
        int taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (this->real(row + r)) {
                Float u[8], u1[8], g[8], a1[8];
                saved.load(g, r * 16 * call.width);
                from_image(shared, u1, AT_V, w.upper[r], w.lower[r], AT_W1);
                this->first_layer(u, w.upper[r], w.lower[r], lane);
                layer.both(u, u1, g, sum[r], a1);
                this->measure(GU1, sum[r], row + r, lane);
                Word high[4], low[4];
                operand(high, low, sum[r]);
                this->template scatter<true>(taps, lane, high, low, AT_S1, unit);
            }
            taps = next<TAPS, TAPS_ROW>(taps);
        }
    }
    DR_DEVICE void stage_d(int row, int warp) const {
        this->finish(call.v, 0.0f, piece.v.down * (at(DOWN_W3) * at(INVERSES + A2)), row, warp);
    }
};
