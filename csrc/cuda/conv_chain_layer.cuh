// A hidden layer's tangents: SiLU and LayerNorm at the 16 pixels of a warp (docs/math.md, M10).
#pragma once
#include "conv_chain_items.cuh"

// SiLU' and SiLU'' at n. If the exponential overflowed, zero times infinity would follow.
DR_DEVICE void silu(Float n, Float& slope, Float& bend) {
    const Float e = exp2_fast(smaller(n * -1.44269504f, 126.0f)), s = reciprocal(e + 1.0f), r = e * s, sr = s * r;
    slope = fused(n, sr, s);
    bend = sr * fused(n, r - s, 2.0f);
}


// SiLU divided by its argument, and SiLU'.
DR_DEVICE void silu_slope(Float n, Float& sigmoid, Float& slope) {
    const Float e = exp2_fast(smaller(n * -1.44269504f, 126.0f));
    sigmoid = reciprocal(e + 1.0f);
    slope = fused(n, sigmoid * (e * sigmoid), sigmoid);
}

// A stage's units, powers of two: u' is u1 times its number; those of g and g' have this ratio; gu' is `gu1` times what
// follows from g's number, a' has the scale `a1`.
struct Units {
    float u1, ratio, gu1, a1, inverse_a1;
};

// A hidden layer's tangents a' and gu' from u, u', g, g' (math.md, (12)). Powers of two are folded into the numbers of a pixel
// or of a channel.
template <bool NORM>
struct Layer {
    Four gamma, beta;
    Units unit;
    float part, eps;

    DR_DEVICE Layer(const Call& call, Shared& shared, const Lane& lane, int vectors, const Units& unit)
        : unit(unit), part(call.part), eps(call.eps) {
        if constexpr (NORM) gamma = four(shared, vectors + VECTOR, lane), beta = four(shared, vectors + 2 * VECTOR, lane);
    }
    // xhat in the place of u, and rs of both pixels.
    DR_DEVICE void normal(Float (&u)[8], Float (&rs)[2]) const {
        sums(rs, u, u);
        CHAIN_UNROLL for (int n = 0; n < 2; ++n) rs[n] = inverse_root(fused(quad_sum(rs[n]), part, eps));
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) u[k] = u[k] * rs[pixel_of(k)];
    }
    // xhat in the place of u, and y with xhat' = rs y in that of u'; rs and mean(xhat u') of both pixels.
    DR_DEVICE void normalize(Float (&u)[8], Float (&u1)[8], Float (&rs)[2], Float (&p)[2]) const {
        normal(u, rs);
        mean(p, u, u1, part);
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) u1[k] = fused(u[k], -p[pixel_of(k)], u1[k]);
    }
    // a in the place of u, and of a gradient's g: gu. g is `unit.u1` times its number; the results have the scales `unit.a1`
    // and `unit.gu1`.
    DR_DEVICE void value(Float (&u)[8]) const {
        Float rs[2], s, slope;
        if constexpr (NORM) normal(u, rs);
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            const Float n = argument(u[k], k);
            silu_slope(n, s, slope);
            u[k] = n * s * unit.a1;
        }
    }
    DR_DEVICE void gradient(Float (&u)[8], Float (&g)[8], Float (&a)[8]) const {
        Float rs[2], m[2], s, slope;
        if constexpr (NORM) normal(u, rs);
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            const Float n = argument(u[k], k);
            silu_slope(n, s, slope);
            a[k] = n * s * unit.a1;
            g[k] = (NORM ? slope * gamma.of[channel_of(k)] : slope * (unit.u1 * unit.gu1)) * g[k];
        }
        if constexpr (NORM) {
            mean(m, g, u, part);
            CHAIN_UNROLL for (int n = 0; n < 2; ++n) rs[n] = rs[n] * (unit.u1 * unit.gu1);
            CHAIN_UNROLL for (int k = 0; k < 8; ++k) g[k] = rs[pixel_of(k)] * fused(u[k], -m[pixel_of(k)], g[k]);
        }
    }
    DR_DEVICE Float argument(Float u, int k) const {
        if constexpr (NORM)
            return fused(gamma.of[channel_of(k)], u, beta.of[channel_of(k)]);
        else
            return u;
    }
    // a' in the place of u'.
    DR_DEVICE void forward(Float (&u)[8], Float (&u1)[8]) const {
        Float slope, bend, rs[2], p[2];
        if constexpr (NORM) {
            normalize(u, u1, rs, p);
            CHAIN_UNROLL for (int n = 0; n < 2; ++n) rs[n] = rs[n] * (unit.u1 * unit.a1);
        }
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            const int c = channel_of(k);
            silu(NORM ? fused(gamma.of[c], u[k], beta.of[c]) : u[k], slope, bend);
            if constexpr (NORM)
                u1[k] = slope * gamma.of[c] * (rs[pixel_of(k)] * u1[k]);
            else
                u1[k] = slope * (u1[k] * (unit.u1 * unit.a1));
        }
    }
    // gu' in the place of g', and a'.
    DR_DEVICE void both(Float (&u)[8], Float (&u1)[8], const Float (&g)[8], Float (&g1)[8], Float (&a1)[8]) const {
        if constexpr (NORM)
            with_norm(u, u1, g, g1, a1);
        else
            without_norm(u, u1, g, g1, a1);
    }
    DR_DEVICE void without_norm(Float (&u)[8], Float (&u1)[8], const Float (&g)[8], Float (&g1)[8], Float (&a1)[8]) const {
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            Float slope, bend;
            silu(u[k], slope, bend);
            a1[k] = slope * (u1[k] * (unit.u1 * unit.a1));
            g1[k] = fused(bend * g[k], u1[k] * (unit.u1 * unit.ratio), slope * g1[k]) * unit.gu1;
        }
    }
    DR_DEVICE void with_norm(Float (&x)[8], Float (&x1)[8], const Float (&g)[8], Float (&g1)[8], Float (&a1)[8]) const {
        Float rs[2], p[2], m[2], q[2], extra[2], t[8];
        normalize(x, x1, rs, p);
        CHAIN_UNROLL for (int n = 0; n < 2; ++n) q[n] = rs[n] * unit.u1;
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            const int c = channel_of(k);
            Float slope, bend;
            silu(fused(gamma.of[c], x[k], beta.of[c]), slope, bend);
            const Float first = gamma.of[c] * unit.a1, second = gamma.of[c] * first * unit.ratio;
            slope = slope * first;
            x1[k] = q[pixel_of(k)] * x1[k];
            a1[k] = slope * x1[k];
            t[k] = slope * g[k];
            g1[k] = fused(bend * g[k], second * x1[k], slope * g1[k]);
        }
        mean(m, t, x, part);
        sums(extra, t, x1), sums(q, g1, x);
        CHAIN_UNROLL for (int n = 0; n < 2; ++n) {
            q[n] = quad_sum(fused(extra[n], unit.ratio, q[n])) * part;
            p[n] = p[n] * rs[n] * (unit.u1 * unit.ratio);
            q[n] = fused(p[n], m[n], -q[n]);
            m[n] = m[n] * unit.ratio;
            rs[n] = rs[n] * (unit.gu1 * unit.inverse_a1);
        }
        CHAIN_UNROLL for (int k = 0; k < 8; ++k) {
            const int n = pixel_of(k);
            g1[k] = rs[n] * fused(q[n], x[k], fused(-m[n], x1[k], fused(-p[n], t[k], g1[k])));
        }
    }
};
