// The stages of the gradient: A makes a1; B z2, gu2, the nine numbers of -h / 2, and the energy; C gu1, and its nine numbers;
// D the gradient. z2 and g1 are saved for products.
#pragma once
#include "conv_chain_stages.cuh"

template <bool NORM, bool MEASURE>
struct Gradient : Stages<MEASURE> {
    static constexpr int FIRST_GUESS = GRADIENT_GUESSES, PICTURES = 1;
    using Base = Stages<MEASURE>;
    using Base::at, Base::call, Base::piece, Base::shared, Base::start;

    // gu2 and gu1 are proportional to u, whose guess has the scale 64.
    DR_DEVICE float cotangents() const { return piece.u.up * (1.0f / 64); }
    DR_DEVICE bool own(int row) const { return start + row >= piece.row0 && start + row < piece.row1; }
    DR_DEVICE Flag own_column(Index column) const { return column >= piece.from && column < piece.to; }
    // Save a plane's row, if it is wanted and this item's.
    DR_DEVICE void save(float* plane, const Float (&x)[8], int row, const Lane& lane) const {
        if (plane == nullptr || !own(row)) return;
        float* to = plane + (piece.image + static_cast<long long>(start + row) * call.width + piece.column0) * 16;
        CHAIN_UNROLL for (int n = 0; n < 2; ++n) {
            const Index column = lane.g + (lane.first + 8 * n);
            const Float four[4] = {x[2 * n], x[2 * n + 1], x[2 * n + 4], x[2 * n + 5]};
            store4(to, column * 16 + lane.t * 4, four, own_column(column));
        }
    }
    // The energy (1 + alpha) / 2 u^2 - u h / 2 of the row's 16 pixels, with -<u, h> / 2 = <a, g> - b <u, 1> / 2.
    DR_DEVICE void add_energy(const Float (&a)[8], const Float (&g)[8], float unit, int row, const Lane& lane, int warp) const {
        if (!own(row)) return;
        const int y = start + row;
        const float* image = call.u + piece.image + static_cast<long long>(y) * call.width + piece.column0;
        Float s[2], energy[2];
        Flag counts[2];
        sums(s, a, g);
        CHAIN_UNROLL for (int n = 0; n < 2; ++n) {
            const Index column = lane.g + (lane.first + 8 * n);
            counts[n] = own_column(column) && lane.t < 1;
            const Float u = load(image, column, counts[n]);
            energy[n] = fused(u * 0.5f, fused(u, 1.0f + call.alpha, -at(LAST_BIAS)), quad_sum(s[n]) * unit);
        }
        const long long place = static_cast<long long>(piece.number) * call.height + y;
        store_sum(call.energies + (place * call.strips() + piece.strip) * BLOCKS + warp, energy, counts);
    }
    DR_DEVICE void stage_a(int row, const Lane& lane) const {
        const Windows w = windows(row, lane);
        const Units units = {1.0f, 0.0f, 0.0f, at(SCALES + A1), 0.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS, units);
        int where = place_of<RING, RING_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (this->real(row + r)) {
                Float u[8];
                this->first_layer(u, w.upper[r], w.lower[r], lane);
                layer.value(u);
                this->measure(A1, u, row + r, lane);
                this->put_row(AT_FORWARD + where, lane, u);
            } else {
                this->put_zeros(AT_FORWARD + where, lane);
            }
            where = next<RING, RING_ROW>(where);
        }
    }
    DR_DEVICE void stage_b(int row, const Lane& lane) const {
        Float sum[ROWS][8];
        convolve(shared, sum, AT_FORWARD, place_of<RING, RING_ROW>(row - 1), lane, AT_W2);
        const float down = at(DOWN_W2) * at(INVERSES + A1), g_unit = at(DOWN_W3) * piece.u.down;
        const Units units = {g_unit, 0.0f, at(SCALES + GU2), at(SCALES + A2), 0.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS + 3 * VECTOR, units);
        const Four bias = four(shared, AT_VECTORS + 3 * VECTOR, lane);
        const Windows w = windows(row, lane);
        int where = place_of<RING, RING_ROW>(row), taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (this->real(row + r)) {
                Float g[8], gu[8], a[8];
                Word high[4], low[4];
                from_image(shared, g, AT_U, w.upper[r], w.lower[r], AT_W3T);
                CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
                    sum[r][k] = fused(sum[r][k], down, bias.of[channel_of(k)]);
                    gu[k] = g[k];
                }
                save(call.z_out, sum[r], row + r, lane);
                layer.gradient(sum[r], gu, a);
                add_energy(a, g, g_unit * at(INVERSES + A2), row + r, lane, lane.first / 16);
                this->measure(GU2, gu, row + r, lane), this->measure(A2, a, row + r, lane);
                this->put_row(AT_BACKWARD + where, lane, gu);
                operand(high, low, a);
                this->template scatter<false>(taps, lane, high, low, AT_S3, 0.0f);
            } else {
                this->put_zeros(AT_BACKWARD + where, lane);
                this->put_zero_taps(taps, lane);
            }
            where = next<RING, RING_ROW>(where), taps = next<TAPS, TAPS_ROW>(taps);
        }
    }
    DR_DEVICE void stage_c(int row, const Lane& lane) const {
        Float sum[ROWS][8];
        convolve(shared, sum, AT_BACKWARD, place_of<RING, RING_ROW>(row - 1), lane, AT_W2T);
        const float down = at(DOWN_W2) * at(INVERSES + GU2);
        const float unit = at(DOWN_W1) * at(INVERSES + GU1) * (at(UP_W3) * at(SCALES + A2));
        const Units units = {1.0f, 0.0f, at(SCALES + GU1), 1.0f, 0.0f};
        const Layer<NORM> layer(call, shared, lane, AT_VECTORS, units);
        const Windows w = windows(row, lane);
        int taps = place_of<TAPS, TAPS_ROW>(row);
        CHAIN_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (this->real(row + r)) {
                Float u[8], a[8];
                CHAIN_UNROLL for (int k = 0; k < 8; ++k) sum[r][k] = sum[r][k] * down;
                save(call.g_out, sum[r], row + r, lane);
                this->first_layer(u, w.upper[r], w.lower[r], lane);
                layer.gradient(u, sum[r], a);
                this->measure(GU1, sum[r], row + r, lane);
                Word high[4], low[4];
                operand(high, low, sum[r]);
                this->template scatter<true>(taps, lane, high, low, AT_S1, unit);
            }
            taps = next<TAPS, TAPS_ROW>(taps);
        }
    }
    DR_DEVICE void stage_d(int row, int warp) const {
        this->finish(call.u, -0.5f * at(LAST_BIAS), at(DOWN_W3) * at(INVERSES + A2), row, warp);
    }
};
