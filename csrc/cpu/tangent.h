// Hessian-vector and parameter products: the tangent of the gradient in the direction v, at a point whose gradient's sweep
// saved the required values. Included once per instruction set (DR_ISA names it).
#pragma once
#include "weight_grad.h"
#include "silu.h"
#include "sweep.h"

namespace DR_ISA {

// The sums over the pixels of one band, lane by lane, in doubles: for each convolution its filters, its biases and (of the
// LayerNorm after it) gamma and beta.
struct ParameterSums {
    int channels;
    std::vector<Floats> w, bias, gamma, beta;
    std::vector<double> total;
    double last_bias = 0.0;
    ParameterSums(int depth, int channels_) : channels(channels_) {
        const size_t lanes = static_cast<size_t>(channels) * LANES;
        for (int l = 1; l <= depth; ++l) {
            w.emplace_back(l == 1 || l == depth ? 9 * lanes : winograd_grad_size(channels), 0.0f);
            for (auto* sum : {&bias, &gamma, &beta}) sum->emplace_back(lanes, 0.0f);
        }
        size_t n = 0;
        for (int l = 0; l < depth; ++l) n += w[l].size() + 3 * lanes;
        total.assign(n, 0.0);
    }
    // Floats accumulate a few rows, doubles the total.
    void flush() {
        double* to = total.data();
        for (size_t l = 0; l < w.size(); ++l)
            for (Floats* from : {&w[l], &bias[l], &gamma[l], &beta[l]}) {
                for (size_t k = 0; k < from->size(); ++k) to[k] += (*from)[k];
                std::fill(from->begin(), from->end(), 0.0f);
                to += from->size();
            }
    }
};

// A trailing 1 marks tangents. With THETA the sums of a parameter product are accumulated, and the last stage, H v itself,
// is omitted.
template <bool THETA>
class TangentSweep : public Sweep {
  public:
    TangentSweep(const Chain& chain, const Batch& batch, const Band& band)
        : Sweep(chain, batch, band, 2 * chain.depth - THETA), u(rows_for(THETA ? 2 * L : L + 1), y, 1, H), u1(u), g3(u),
          g31(rows_for(1), y, 1, H), direct(pairs_for(L), y.block(1)), cot(y.piece(MAX_PIECE)), gu(cot),
          z1(pairs_for(2 * L - 2), y.block()), scratch(THETA ? WEIGHT_GRAD_SCRATCH : 0) {
        for (int l = 0; l < L; ++l) {
            const int lag = 2 * (L - l);
            // Cotangents read the primal activations many pairs later, with a row above and below.
            a.emplace_back(THETA ? rows_for(lag + 2) : 1, y, THETA && l ? C : 1, H);
            a1.emplace_back(rows_for(1), y, l ? C : 1, H);
            gz1.emplace_back(rows_for(1), y, l ? C : 1, H);
            for (auto* pairs : {&slope, &rest}) pairs->emplace_back(pairs_for(lag), l ? y.block() : 0);
            steep.emplace_back(pairs_for(lag), l && ((c.pixel_norm && THETA) || c.image_norm) ? y.block() : 0);
            mean.emplace_back(pairs_for(lag), l && c.pixel_norm ? y.block(1) : 0);
        }
    }

    DR_INLINE void sweep(const float* image, const float* direction, const SavedActivations& saved, float* out,
                         ParameterSums* sums) {
        run([&](int r) {
                split(image, r, c.center, u);
                split(direction, r, 0.0f, u1);
                seed(r, saved);
            },
            [&](int s, int pair) {
                if (s < L - 1)
                    forward(s + 1, pair, saved, sums);
                else if (s == L - 1)
                    head(pair, sums);
                else if (s < 2 * L - 1)
                    backward(2 * L - 1 - s, pair, saved, sums);
                else if (inside(pair))
                    write_result(gz1[1], direct, pair, out);
                if (THETA && s == 2 * L - 2 && pair % 4 == 3) sums->flush();
            });
        if (THETA) sums->flush();
    }

  protected:
    // The primal cotangent of h.
    DR_INLINE void seed(int r, const SavedActivations& saved) {
        const float *pixel = u.row(r), *h = saved.h(r / 2);
        float* g = g3.row(r);
        for_pieces(y, [&](int v0, int n) {
            for (int q = 0; q < 2 * n; ++q) {
                const size_t line = q / n * y.line + static_cast<size_t>(v0 + q % n) * LANES;
                store(g + line, phi.grad_h(load(pixel + line), load(h + y.piece(1, v0) + ((r % 2) * 2 * n + q) * LANES)));
            }
        });
        g3.trim(r);
    }

    DR_INLINE void forward(int l, int pair, const SavedActivations& saved, ParameterSums* sums) {
        const float *gamma = c.gamma[l - 1], *beta = c.beta[l - 1];
        const Rows in = u.around(2 * pair), seeds = g3.around(2 * pair);
        const auto body = [&](int v0, auto count, float* raw) {
            constexpr int N = count();
            // Saved by the gradient's sweep, or recomputed.
            const float* z = l > 1 ? saved.z(l, pair) + y.piece(v0) : nullptr;
            const float* g = l < L - 1 ? saved.g(l, pair) + y.piece(v0) : cot.data();
            float* first = z1.at(pair) + y.piece(v0);
            if (l == 1) conv_from_one(in, v0, N, y, c.forward[0], c.bias[0], first), z = first;
            if (l == L - 1) conv_from_one(seeds, v0, N, y, c.backward[l], nullptr, cot.data());
            float *sl = slope[l].at(pair) + y.piece(v0), *q0 = rest[l].at(pair) + y.piece(v0);
            for (int k = 0; k < rows(pair); ++k) {
                float *act = THETA ? a[l].row(2 * pair + k) : nullptr, *act1 = a1[l].row(2 * pair + k);
                if (!c.pixel_norm) {
                    for_registers_rolled<N>(y, k, v0, [&](int, int, size_t o, size_t line) {
                        const Vec n1 = load(raw + o), cv = load(g + o);
                        const Silu f = silu(load(z + o));
                        if (THETA) store(act + line, f.value), store(gu.data() + o, f.slope * cv);
                        store(act1 + line, f.slope * n1);
                        store(sl + o, f.slope);
                        store(q0 + o, f.bend * cv * n1);
                    });
                    continue;
                }
                const size_t row = y.piece(1, v0) + 2 * k * N * LANES;
                const float *scale = saved.rs(l, pair) + row, *m2 = saved.m2(l, pair) + row;
                Vec p[2 * N], s0[2 * N] = {};
                channel_means<N>(y, k, v0, p, [&](int, int q, size_t o, size_t) {
                    if (l > 1) return load(raw + o) * load(z + o);
                    const Vec zv = load(first + o) * load(scale + q * LANES);
                    store(first + o, zv);
                    return load(raw + o) * zv;
                });
                float* st = THETA ? steep[l].at(pair) + y.piece(v0) : nullptr;
                const bool add = THETA && inside(pair);
                for_registers<N>(y, k, v0, [&](int ch, int q, size_t o, size_t line) {
                    const Vec zv = load(z + o), rs = load(scale + q * LANES), m = load(m2 + q * LANES), cv = load(g + o);
                    const Vec x1 = rs * (load(raw + o) - zv * p[q]), gx = gamma[ch] * x1, gc = gamma[ch] * cv;
                    const Silu f = silu(gamma[ch] * zv + beta[ch]);
                    const Vec bent = f.bend * gc, b = bent * gx, t = f.slope * gc, primal = rs * t - zv * m;
                    store(act1 + line, f.slope * gx);
                    store(sl + o, rs * (gamma[ch] * f.slope));
                    store(q0 + o, rs * (b - p[q] * primal) - x1 * m);
                    s0[q] += b * zv + t * x1;
                    if (!THETA) return;
                    store(act + line, f.value);
                    store(gu.data() + o, primal);
                    store(st + o, f.slope);
                    if (!add) return;
                    const IntVec mask = own(q / N, v0 + q % N);
                    accumulate(sums->beta[l - 1], ch, masked(bent * x1, mask));
                    accumulate(sums->gamma[l - 1], ch, masked(bent * x1 * zv + cv * f.slope * x1, mask));
                });
                float* to = mean[l].at(pair) + row;
                for (int q = 0; q < 2 * N; ++q) store(to + q * LANES, load(scale + q * LANES) * s0[q] * (1.0f / C));
            }
            if (THETA && inside(pair)) add_weight_grad<N>(l, pair, v0, gu.data(), l > 1 ? a1[l - 1] : u1, sums);
        };
        convolve(l > 1 ? a1[l - 1] : u1, l == 1, pair, c.forward[l - 1], nullptr, body,
                 {saved.z(l, pair), saved.g(l, pair)});
        for (int k = 0; k < rows(pair); ++k) {
            a1[l].trim(2 * pair + k);
            if (THETA) a[l].trim(2 * pair + k);
        }
    }

    DR_INLINE void head(int pair, ParameterSums* sums) {
        convolve_to_one(a1[L - 1], pair, c.forward[L - 1], 0.0f, [&](int v0, int n, float* raw) {
            float* by = direct.at(pair) + y.piece(1, v0);
            alignas(64) float primal[4 * MAX_PIECE * LANES] = {}, tangent[4 * MAX_PIECE * LANES] = {};
            for (int k = 0; k < rows(pair); ++k)
                for (int q = 0; q < 2 * n; ++q) {
                    const size_t o = (2 * k * n + q) * LANES, line = q / n * y.line + (v0 + q % n) * LANES;
                    const Vec pixel = load(u1.row(2 * pair + k) + line), h = load(raw + o), g = phi.grad_h(pixel, h);
                    store(g31.row(2 * pair + k) + line, g);
                    store(by + o, phi.grad_u(pixel, h));
                    if (!THETA) continue;
                    const IntVec mask = own(q / n, v0 + q % n);
                    store(tangent + o, masked(g, mask));
                    store(primal + o, masked(load(g3.row(2 * pair + k) + line), mask));
                }
            if (!THETA || !inside(pair)) return;
            for (float g : tangent) sums->last_bias += g;
            float* dw = sums->w[L - 1].data();
            weight_grad_to_one(a1[L - 1].around(2 * pair), primal, v0, n, y, dw);
            weight_grad_to_one(a[L - 1].around(2 * pair), tangent, v0, n, y, dw);
        });
        for (int k = 0; k < rows(pair); ++k) g31.trim(2 * pair + k);
    }

    DR_INLINE void backward(int l, int pair, const SavedActivations& saved, ParameterSums* sums) {
        const auto body = [&](int v0, auto count, float* raw) {
            constexpr int N = count();
            const float *sl = slope[l].at(pair) + y.piece(v0), *q0 = rest[l].at(pair) + y.piece(v0);
            const float *z = l > 1 ? saved.z(l, pair) + y.piece(v0) : z1.at(pair) + y.piece(v0);
            for (int k = 0; k < rows(pair); ++k) {
                float* out1 = gz1[l].row(2 * pair + k);
                if (!c.pixel_norm) {
                    for_registers_rolled<N>(y, k, v0, [&](int, int, size_t o, size_t line) {
                        const Vec g = load(q0 + o) + load(raw + o) * load(sl + o);
                        store(out1 + line, g);
                        if (THETA) store(raw + o, g);
                    });
                    continue;
                }
                if (THETA && inside(pair)) {
                    const float* st = steep[l].at(pair) + y.piece(v0);
                    for_registers<N>(y, k, v0, [&](int ch, int q, size_t o, size_t) {
                        const Vec g = masked(load(raw + o) * load(st + o), own(q / N, v0 + q % N));
                        accumulate(sums->beta[l - 1], ch, g);
                        accumulate(sums->gamma[l - 1], ch, g * load(z + o));
                    });
                }
                Vec m[2 * N];
                const float* s0 = mean[l].at(pair) + y.piece(1, v0) + 2 * k * N * LANES;
                channel_means<N>(y, k, v0, m, [&](int, int, size_t o, size_t) {
                    const Vec w = load(raw + o) * load(sl + o);
                    store(raw + o, w);
                    return w * load(z + o);
                });
                for (int q = 0; q < 2 * N; ++q) m[q] += load(s0 + q * LANES);
                for_registers<N>(y, k, v0, [&](int, int q, size_t o, size_t line) {
                    const Vec g = load(q0 + o) + load(raw + o) - load(z + o) * m[q];
                    store(out1 + line, g);
                    if (THETA) store(raw + o, g);
                });
            }
            if (THETA && inside(pair)) {
                add_weight_grad<N>(l, pair, v0, raw, l > 1 ? a[l - 1] : u, sums);
                for (int k = 0; k < 2; ++k)
                    for_registers_rolled<N>(y, k, v0, [&](int ch, int, size_t o, size_t) {
                        accumulate(sums->bias[l - 1], ch, load(raw + o));
                    });
            }
        };
        convolve(l < L - 1 ? gz1[l + 1] : g31, l == L - 1, pair, c.backward[l], nullptr, body);
        for (int k = 0; k < rows(pair); ++k) gz1[l].trim(2 * pair + k);
    }

    static DR_INLINE void accumulate(Floats& sum, int ch, Vec v) {
        float* p = sum.data() + ch * LANES;
        store(p, load(p) + v);
    }

    // Contribution of a piece's cotangents to the gradient of the filters applied to `in`. Sets the cotangents to zero in
    // pixels outside the strip's own columns or outside the image.
    template <int N>
    DR_INLINE void add_weight_grad(int l, int pair, int v0, float* block, const Ring& in, ParameterSums* sums) {
        for (int k = 0; k < 2; ++k)
            for_registers<N>(y, k, v0, [&](int, int q, size_t o, size_t) {
                store(block + o, k < rows(pair) ? masked(load(block + o), own(q / N, v0 + q % N)) : Vec{});
            });
        float* dw = sums->w[l - 1].data();
        if (l == 1)
            weight_grad_from_one(in.around(2 * pair), block, v0, N, y, dw);
        else
            winograd_weight_grad(in.around(2 * pair), block, v0, N, y, tiles(), scratch.data(), dw);
    }

    Ring u, u1, g3, g31;
    Pairs direct;
    Floats cot, gu;
    Pairs z1;
    Floats scratch;
    std::vector<Ring> a, a1, gz1;
    // slope: d(SiLU of LayerNorm); rest: term independent of the incoming cotangent; steep: dSiLU; mean: part of a mean.
    std::vector<Pairs> slope, rest, steep, mean;
};

}  // namespace DR_ISA
