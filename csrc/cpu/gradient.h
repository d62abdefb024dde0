// Value and gradient of the regularizer. Included once per instruction set (DR_ISA names it).
#pragma once
#include "silu.h"
#include "sweep.h"

namespace DR_ISA {

class GradientSweep : public Sweep {
  public:
    GradientSweep(const Chain& chain, const Batch& batch, const Band& band)
        : Sweep(chain, batch, band, 2 * chain.depth), u(rows_for(L + 1), y, 1, H), g3(rows_for(1), y, 1, H),
          direct(pairs_for(L), y.block(1)) {
        for (int l = 0; l < L; ++l) {
            a.emplace_back(rows_for(1), y, l ? C : 1, H);
            gz.emplace_back(rows_for(1), y, l ? C : 1, H);
            slope.emplace_back(pairs_for(2 * (L - l)), l ? y.block() : 0);
            xhat.emplace_back(pairs_for(2 * (L - l)), l && (c.pixel_norm || c.image_norm) ? y.block() : 0);
        }
    }

    // value [H] of the strip, grad [H, W] of the image.
    DR_INLINE void sweep(const float* image, double* value, float* grad, const SavedActivations& saved) {
        run([&](int r) { split(image, r, c.center, u); },
            [&](int s, int pair) {
                if (s < L - 1)
                    forward(s + 1, pair, saved);
                else if (s == L - 1)
                    head(pair, value, saved);
                else if (s < 2 * L - 1)
                    backward(2 * L - 1 - s, pair, saved);
                else if (inside(pair))
                    write_result(gz[1], direct, pair, grad);
            });
    }

  protected:
    DR_INLINE void forward(int l, int pair, const SavedActivations& saved) {
        const float *gamma = c.gamma[l - 1], *beta = c.beta[l - 1];
        convolve(l > 1 ? a[l - 1] : u, l == 1, pair, c.forward[l - 1], c.bias[l - 1], [&](int v0, auto count, float* raw) {
            constexpr int N = count();
            float *sl = slope[l].at(pair) + y.piece(v0), *xh = xhat[l].at(pair) + (c.pixel_norm ? y.piece(v0) : 0);
            float* plane = inside(pair) && saved.z(l, pair) ? saved.z(l, pair) + y.piece(v0) : nullptr;
            for (int k = 0; k < rows(pair); ++k) {
                float* act = a[l].row(2 * pair + k);
                if (!c.pixel_norm) {
                    for_registers_rolled<N>(y, k, v0, [&](int, int, size_t o, size_t line) {
                        const Vec n = load(raw + o);
                        const Silu f = silu(n);
                        store(act + line, f.value);
                        store(sl + o, f.slope);
                        if (plane) store(plane + o, n);
                    });
                    continue;
                }
                Vec scale[2 * N];
                channel_means<N>(y, k, v0, scale, [&](int, int, size_t o, size_t) { return load(raw + o) * load(raw + o); });
                for (Vec& s : scale) s = rsqrt(s + c.eps);
                for_registers<N>(y, k, v0, [&](int ch, int q, size_t o, size_t line) {
                    const Vec z = load(raw + o) * scale[q];
                    const Silu f = silu(gamma[ch] * z + beta[ch]);
                    store(act + line, f.value);
                    store(sl + o, scale[q] * (gamma[ch] * f.slope));
                    store(xh + o, z);
                    if (plane) store(plane + o, z);
                });
                if (saved && inside(pair))
                    for (int q = 0; q < 2 * N; ++q)
                        store(saved.rs(l, pair) + y.piece(1, v0) + (2 * k * N + q) * LANES, scale[q]);
            }
        });
        for (int k = 0; k < rows(pair); ++k) a[l].trim(2 * pair + k);
    }

    DR_INLINE void head(int pair, double* value, const SavedActivations& saved) {
        DoubleVec sum[2] = {};
        convolve_to_one(a[L - 1], pair, c.forward[L - 1], c.bias[L - 1][0], [&](int v0, int n, float* raw) {
            float* by = direct.at(pair) + y.piece(1, v0);
            float* h = saved && inside(pair) ? saved.h(pair) + y.piece(1, v0) : nullptr;
            for (int k = 0; k < rows(pair); ++k)
                for (int q = 0; q < 2 * n; ++q) {
                    const size_t o = (2 * k * n + q) * LANES, line = q / n * y.line + (v0 + q % n) * LANES;
                    const Vec pixel = load(u.row(2 * pair + k) + line), found = load(raw + o);
                    sum[k] += to_double(masked(phi.value(pixel, found), own(q / n, v0 + q % n)));
                    store(g3.row(2 * pair + k) + line, phi.grad_h(pixel, found));
                    store(by + o, phi.grad_u(pixel, found));
                    if (h) store(h + o, found);
                }
        });
        for (int k = 0; k < rows(pair); ++k) {
            g3.trim(2 * pair + k);
            if (inside(pair)) value[2 * pair + k] = sum_lanes(sum[k]);
        }
    }

    DR_INLINE void backward(int l, int pair, const SavedActivations& saved) {
        convolve(l < L - 1 ? gz[l + 1] : g3, l == L - 1, pair, c.backward[l], nullptr, [&](int v0, auto count, float* raw) {
            constexpr int N = count();
            const float *sl = slope[l].at(pair) + y.piece(v0), *xh = xhat[l].at(pair) + (c.pixel_norm ? y.piece(v0) : 0);
            float* plane = inside(pair) && saved.g(l, pair) ? saved.g(l, pair) + y.piece(v0) : nullptr;
            for (int k = 0; k < rows(pair); ++k) {
                float* out = gz[l].row(2 * pair + k);
                if (!c.pixel_norm) {
                    for_registers_rolled<N>(y, k, v0, [&](int, int, size_t o, size_t line) {
                        store(out + line, load(sl + o) * load(raw + o));
                        if (plane) store(plane + o, load(raw + o));
                    });
                    continue;
                }
                Vec m[2 * N];
                // The mean of t is omitted: the transpose of centered filters maps constants to zero.
                channel_means<N>(y, k, v0, m, [&](int, int, size_t o, size_t) {
                    const Vec g = load(raw + o), t = g * load(sl + o);
                    if (plane) store(plane + o, g);
                    store(raw + o, t);
                    return t * load(xh + o);
                });
                for_registers<N>(y, k, v0, [&](int, int q, size_t o, size_t line) {
                    store(out + line, load(raw + o) - load(xh + o) * m[q]);
                });
                if (saved && inside(pair))
                    for (int q = 0; q < 2 * N; ++q) store(saved.m2(l, pair) + y.piece(1, v0) + (2 * k * N + q) * LANES, m[q]);
            }
        });
        for (int k = 0; k < rows(pair); ++k) gz[l].trim(2 * pair + k);
    }

    Ring u, g3;
    Pairs direct;
    std::vector<Ring> a, gz;
    std::vector<Pairs> slope, xhat;  // of the LayerNorm and SiLU together; of the LayerNorm
};

}  // namespace DR_ISA
