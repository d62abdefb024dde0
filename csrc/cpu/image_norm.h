// LayerNorm over a whole image. Its mean and variance are known only when a layer is complete, so the stages run one after
// another, each over the whole image, with the loops of the other sweeps. Included once per instruction set (DR_ISA names it).
#pragma once
#include <cmath>

#include "gradient.h"
#include "tangent.h"

namespace DR_ISA {

// Call body(pair, channel, o, r, line, own), where o is the offset in a pair's block, r the row, line the offset in its
// lines, and done(pair) after each pair of rows. The size of a piece is not a constant: these stages are bound by memory.
template <class S, class F, class G>
static DR_INLINE void for_image(const S& s, F body, G done) {
    for (int pair = 0; 2 * pair < s.H; done(pair++))
        for_pieces(s.y, [&](int v0, int n) DR_LAMBDA {
            for (int k = 0; k < s.rows(pair); ++k) {
                size_t o = s.y.piece(v0) + static_cast<size_t>(k) * s.C * 2 * n * LANES;
                for (int ch = 0; ch < s.C; ++ch)
                    for (int parity = 0; parity < 2; ++parity)
                        for (int v = v0; v < v0 + n; ++v, o += LANES)
                            body(pair, ch, o, 2 * pair + k, (2 * ch + parity) * s.y.line + static_cast<size_t>(v) * LANES,
                                 s.own(parity, v));
            }
        });
}
template <class S, class F>
static DR_INLINE void for_image(const S& s, F body) {
    for_image(s, body, [](int) {});
}

// A mean over the channels and pixels of an image, in doubles.
struct Average {
    DoubleVec sum{};
    DR_INLINE void add(Vec v, IntVec own) { sum += to_double(masked(v, own)); }
    double mean(double count) const { return sum_lanes(sum) / count; }
};

class ImageNormGradient : public GradientSweep {
  public:
    using GradientSweep::GradientSweep;

    void sweep(const float* image, double* value, float* grad, const SavedActivations& saved) {
        const double count = static_cast<double>(C) * H * image_width;
        std::vector<float> rs(L);
        for (int r = 0; r < H; ++r) split(image, r, c.center, u);
        for (int l = 1; l < L; ++l) rs[l] = forward(l, count, saved);
        for (int pair = 0; 2 * pair < H; ++pair) head(pair, value, saved);
        Pairs t(pairs_for(0), y.block());
        for (int l = L - 1; l > 0; --l) backward(l, count, rs[l], saved, t);
        for (int pair = 0; 2 * pair < H; ++pair) write_result(gz[1], direct, pair, grad);
    }

  private:
    template <class S, class F, class G>
    friend void for_image(const S&, F, G);

    float forward(int l, double count, const SavedActivations& saved) {
        const float *gamma = c.gamma[l - 1], *beta = c.beta[l - 1];
        Pairs &x = xhat[l], &s = slope[l];
        convolve_image(l > 1 ? a[l - 1] : u, l == 1, c.forward[l - 1], c.bias[l - 1], x);
        Average first, second;
        for_image(*this, [&](int pair, int, size_t o, int, size_t, IntVec own) { first.add(load(x.at(pair) + o), own); });
        const float mean = static_cast<float>(first.mean(count));
        for_image(*this, [&](int pair, int, size_t o, int, size_t, IntVec own) {
            const Vec centered = load(x.at(pair) + o) - mean;
            second.add(centered * centered, own);
        });
        const float rs = static_cast<float>(1.0 / std::sqrt(second.mean(count) + c.eps));
        for_image(*this, [&](int pair, int ch, size_t o, int r, size_t line, IntVec) {
            const Vec z = (load(x.at(pair) + o) - mean) * rs;
            const Silu f = silu(gamma[ch] * z + beta[ch]);
            store(x.at(pair) + o, z);
            store(s.at(pair) + o, gamma[ch] * f.slope);
            store(a[l].row(r) + line, f.value);
            if (float* plane = saved.z(l, pair)) store(plane + o, z);
        });
        for (int r = 0; r < H; ++r) a[l].trim(r);
        if (saved) saved.statistics(l)[0] = mean, saved.statistics(l)[1] = rs;
        return rs;
    }

    void backward(int l, double count, float rs, const SavedActivations& saved, Pairs& t) {
        Average one, two;
        convolve_image(l < L - 1 ? gz[l + 1] : g3, l == L - 1, c.backward[l], nullptr, t);
        for_image(*this, [&](int pair, int, size_t o, int, size_t, IntVec own) {
            const Vec g = load(t.at(pair) + o), v = g * load(slope[l].at(pair) + o);
            if (float* plane = saved.g(l, pair)) store(plane + o, g);
            store(t.at(pair) + o, v);
            one.add(v, own);
            two.add(v * load(xhat[l].at(pair) + o), own);
        });
        const float m1 = static_cast<float>(one.mean(count)), m2 = static_cast<float>(two.mean(count));
        for_image(*this, [&](int pair, int, size_t o, int r, size_t line, IntVec) {
            store(gz[l].row(r) + line, rs * (load(t.at(pair) + o) - m1 - load(xhat[l].at(pair) + o) * m2));
        });
        for (int r = 0; r < H; ++r) gz[l].trim(r);
        if (saved) saved.statistics(l)[2] = m1, saved.statistics(l)[3] = m2;
    }
};

template <bool THETA>
class ImageNormTangent : public TangentSweep<THETA> {
    using Base = TangentSweep<THETA>;
    using Base::a, Base::a1, Base::c, Base::C, Base::g3, Base::g31, Base::gz1, Base::H, Base::L, Base::rest, Base::slope,
        Base::steep, Base::u, Base::u1, Base::y, Base::z1;

  public:
    ImageNormTangent(const Chain& chain, const Batch& batch, const Band& band)
        : Base(chain, batch, band), gu_(y.piece(MAX_PIECE)) {
        for (int l = 0; l < L; ++l) t_.emplace_back(Base::pairs_for(0), l ? y.block() : 0);
        p_.resize(L), tx_.resize(L);
    }

    void sweep(const float* image, const float* direction, const SavedActivations& saved, float* out, ParameterSums* sums) {
        const double count = static_cast<double>(C) * H * Base::image_width;
        for (int r = 0; r < H; ++r) {
            Base::split(image, r, c.center, u);
            Base::split(direction, r, 0.0f, u1);
            Base::seed(r, saved);
        }
        for (int l = 1; l < L; ++l) forward(l, count, saved, sums);
        for (int pair = 0; 2 * pair < H; ++pair) Base::head(pair, sums), flush(pair, sums);
        for (int l = L - 1; l > 0; --l) backward(l, count, saved, sums);
        if (THETA) sums->flush();
        for (int pair = 0; 2 * pair < H && !THETA; ++pair) Base::write_result(gz1[1], Base::direct, pair, out);
    }

  private:
    template <class S, class F, class G>
    friend void for_image(const S&, F, G);

    // Floats accumulate a few rows, doubles the total.
    static void flush(int pair, ParameterSums* sums) {
        if (THETA && pair % 4 == 3) sums->flush();
    }

    const float* z(int l, int pair, const SavedActivations& saved) { return l > 1 ? saved.z(l, pair) : z1.at(pair); }

    // The filters' sums of cotangents f(pair, o) with `in`.
    template <class F>
    void add_weight_grad(int l, const Ring& in, ParameterSums* sums, F f) {
        for (int pair = 0; 2 * pair < H; ++pair) {
            for_constant_pieces(y, [&](int v0, auto count) {
                constexpr int N = count();
                for (int k = 0; k < Base::rows(pair); ++k)
                    for_registers<N>(y, k, v0, [&](int, int, size_t o, size_t) {
                        store(gu_.data() + o, f(pair, o + y.piece(v0)));
                    });
                Base::template add_weight_grad<N>(l, pair, v0, gu_.data(), in, sums);
            });
            flush(pair, sums);
        }
    }

    void forward(int l, double count, const SavedActivations& saved, ParameterSums* sums) {
        const float *gamma = c.gamma[l - 1], *beta = c.beta[l - 1], *statistics = saved.statistics(l);
        const float mean = statistics[0], rs = statistics[1], m1 = statistics[2], m2 = statistics[3];
        Pairs &x1 = steep[l], &t = t_[l];
        Base::convolve_image(l > 1 ? a1[l - 1] : u1, l == 1, c.forward[l - 1], nullptr, x1);
        if (l == 1) {
            Base::convolve_image(u, true, c.forward[0], c.bias[0], z1);
            for_image(*this, [&](int pair, int, size_t o, int, size_t, IntVec) {
                store(z1.at(pair) + o, (load(z1.at(pair) + o) - mean) * rs);
            });
        }
        if (l == L - 1) Base::convolve_image(g3, true, c.backward[l], nullptr, t);
        Average constant, along, across;
        for_image(*this, [&](int pair, int, size_t o, int, size_t, IntVec own) {
            const Vec v = load(x1.at(pair) + o);
            constant.add(v, own);
            along.add(v * load(z(l, pair, saved) + o), own);
        });
        const float p0 = static_cast<float>(constant.mean(count)), p = static_cast<float>(along.mean(count));
        for_image(*this, [&](int pair, int ch, size_t o, int r, size_t line, IntVec own) {
            const Vec zv = load(z(l, pair, saved) + o), cv = load((l < L - 1 ? saved.g(l, pair) : t.at(pair)) + o);
            const Vec x = rs * (load(x1.at(pair) + o) - p0 - zv * p), gx = gamma[ch] * x, gc = gamma[ch] * cv;
            const Silu f = silu(gamma[ch] * zv + beta[ch]);
            const Vec bent = f.bend * gc;
            store(x1.at(pair) + o, x);
            store(t.at(pair) + o, f.slope * gc);
            store(slope[l].at(pair) + o, f.slope);
            store(rest[l].at(pair) + o, bent * gx);
            store(a1[l].row(r) + line, f.slope * gx);
            across.add(f.slope * gc * x, own);
            if (!THETA) return;
            store(a[l].row(r) + line, f.value);
            Base::accumulate(sums->beta[l - 1], ch, masked(bent * x, own));
            Base::accumulate(sums->gamma[l - 1], ch, masked(bent * x * zv + cv * f.slope * x, own));
        }, [&](int pair) { flush(pair, sums); });
        p_[l] = p, tx_[l] = static_cast<float>(across.mean(count));
        for (int r = 0; r < H; ++r) {
            a1[l].trim(r);
            if (THETA) a[l].trim(r);
        }
        if (THETA)
            add_weight_grad(l, l > 1 ? a1[l - 1] : u1, sums, [&](int pair, size_t o) {
                return rs * (load(t.at(pair) + o) - m1 - load(z(l, pair, saved) + o) * m2);
            });
    }

    void backward(int l, double count, const SavedActivations& saved, ParameterSums* sums) {
        const float *gamma = c.gamma[l - 1], *statistics = saved.statistics(l);
        const float rs = statistics[1], m1 = statistics[2], m2 = statistics[3], p = p_[l], tx = tx_[l];
        Pairs raw(Base::pairs_for(0), y.block());
        Base::convolve_image(l < L - 1 ? gz1[l + 1] : g31, l == L - 1, c.backward[l], nullptr, raw);
        Average constant, along;
        for_image(*this, [&](int pair, int ch, size_t o, int, size_t, IntVec own) {
            const Vec zv = load(z(l, pair, saved) + o), w = load(raw.at(pair) + o) * load(slope[l].at(pair) + o);
            const Vec t1 = load(rest[l].at(pair) + o) + gamma[ch] * w;
            store(rest[l].at(pair) + o, t1);
            constant.add(t1, own);
            along.add(t1 * zv, own);
            if (!THETA) return;
            Base::accumulate(sums->beta[l - 1], ch, masked(w, own));
            Base::accumulate(sums->gamma[l - 1], ch, masked(w * zv, own));
        }, [&](int pair) { flush(pair, sums); });
        const float t0 = static_cast<float>(constant.mean(count)), tz = static_cast<float>(along.mean(count));
        for_image(*this, [&](int pair, int ch, size_t o, int r, size_t line, IntVec own) {
            const Vec zv = load(z(l, pair, saved) + o), gu = rs * (load(t_[l].at(pair) + o) - m1 - zv * m2);
            const Vec e = load(rest[l].at(pair) + o) - t0 - zv * (tz + tx) - load(steep[l].at(pair) + o) * m2;
            const Vec g = rs * (e - p * gu);
            store(gz1[l].row(r) + line, g);
            if (!THETA) return;
            store(raw.at(pair) + o, g);
            Base::accumulate(sums->bias[l - 1], ch, masked(g, own));
        }, [&](int pair) { flush(pair, sums); });
        for (int r = 0; r < H; ++r) gz1[l].trim(r);
        if (THETA) add_weight_grad(l, l > 1 ? a[l - 1] : u, sums, [&](int pair, size_t o) { return load(raw.at(pair) + o); });
    }

    Floats gu_;
    std::vector<Pairs> t_;
    std::vector<float> p_, tx_;  // mean(xhat u'), mean(t xhat')
};

}  // namespace DR_ISA
