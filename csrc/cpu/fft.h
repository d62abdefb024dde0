// The complex FFT of any length, and the DCT by it. Included once per instruction set (DR_ISA names it).
#pragma once
#include <algorithm>

#include "lines.h"
#include "srm.h"

namespace DR_ISA {

using dr::Lines;

// a (w[0] + i w[1]).
static DR_INLINE Complex times_twiddle(Complex a, const float* w) {
    const Vec16 c = broadcast16(w[0]), s = broadcast16(w[1]);
    return {a.re * c - a.im * s, mul_add(a.re, s, a.im * c)};
}

// DFTs of 2 to 5 points, in place.
static DR_INLINE void dft(Complex (&t)[2]) {
    const Complex a = t[0], b = t[1];
    t[0] = a + b, t[1] = a - b;
}
static DR_INLINE void dft(Complex (&t)[3]) {
    const Complex a = t[1] + t[2], b = scaled(t[1] - t[2], 0.866025403784438647f), c = add_scaled(t[0], a, -0.5f);
    t[0] = t[0] + a, t[1] = minus_i(c, b), t[2] = plus_i(c, b);
}
static DR_INLINE void dft(Complex (&t)[4]) {
    const Complex a = t[0] + t[2], b = t[0] - t[2], c = t[1] + t[3], d = t[1] - t[3];
    t[0] = a + c, t[1] = minus_i(b, d), t[2] = a - c, t[3] = plus_i(b, d);
}
static DR_INLINE void dft(Complex (&t)[5]) {
    constexpr float c1 = 0.309016994374947424f, s1 = 0.951056516295153572f;
    constexpr float c2 = -0.809016994374947424f, s2 = 0.587785252292473129f;
    const Complex a = t[1] + t[4], b = t[1] - t[4], c = t[2] + t[3], d = t[2] - t[3];
    const Complex e = add_scaled(add_scaled(t[0], a, c1), c, c2), f = add_scaled(add_scaled(t[0], a, c2), c, c1);
    const Complex g = add_scaled(scaled(b, s1), d, s2), h = add_scaled(scaled(b, s2), d, -s1);
    t[0] = t[0] + a + c, t[1] = minus_i(e, g), t[4] = plus_i(e, g), t[2] = minus_i(f, h), t[3] = plus_i(f, h);
}

// One pass of Stockham's FFT: `before` = product of the radices so far, `inner` = n / (before R).
template <int R>
static void fft_pass(int before, int inner, const float* w, const float* in, float* out) {
    for (int k = 0; k < before; ++k)
        for (int i = 0; i < inner; ++i) {
            Complex t[R];
            for (int j = 0; j < R; ++j) t[j] = load_complex(in + (i + inner * (j + R * k)) * LINES);
            dft(t);
            store(out + (i + inner * k) * LINES, t[0]);
            for (int j = 1; j < R; ++j)
                store(out + (i + inner * (k + before * j)) * LINES,
                      i ? times_twiddle(t[j], w + 2 * (i * (R - 1) + j - 1)) : t[j]);
        }
}
// The same for any radix; `roots` are its roots of unity.
static void fft_pass(int radix, int before, int inner, const float* w, const float* roots, const float* in, float* out) {
    for (int k = 0; k < before; ++k)
        for (int i = 0; i < inner; ++i)
            for (int j = 0; j < radix; ++j) {
                Complex sum = load_complex(in + (i + inner * radix * k) * LINES);
                // In blocks: the error of one chain of hundreds of additions is twice that of PyTorch's matrix product.
                for (int l = 1, at = j; l < radix;) {
                    Complex part{broadcast16(0.0f), broadcast16(0.0f)};
                    for (const int end = std::min(l + 16, radix); l < end; ++l, at = at + j < radix ? at + j : at + j - radix)
                        part = part + times_twiddle(load_complex(in + (i + inner * (l + radix * k)) * LINES), roots + 2 * at);
                    sum = sum + part;
                }
                store(out + (i + inner * (k + before * j)) * LINES,
                    i && j ? times_twiddle(sum, w + 2 * (i * (radix - 1) + j - 1)) : sum);
            }
}

// The FFT of n complex [16 re, 16 im]; returns the buffer of the result, `a` or `b`.
static float* fft(const Lines& plan, float* a, float* b) {
    const float* w = plan.twiddles.data();
    int before = 1;
    for (const int radix : plan.radices) {
        const int inner = plan.n / (before * radix);
        const float* roots = w + 2 * inner * (radix - 1);
        switch (radix) {
            case 2: fft_pass<2>(before, inner, w, a, b); break;
            case 3: fft_pass<3>(before, inner, w, a, b); break;
            case 4: fft_pass<4>(before, inner, w, a, b); break;
            case 5: fft_pass<5>(before, inner, w, a, b); break;
            default: fft_pass(radix, before, inner, w, roots, a, b);
        }
        w = roots + (radix > 5 ? 2 * radix : 0);
        before *= radix;
        std::swap(a, b);
    }
    return a;
}

// Where Makhoul's reordering puts sample j of n: the even samples, then the odd ones in reverse.
static DR_INLINE int makhoul(int j, int n) { return j % 2 ? n - 1 - j / 2 : j / 2; }

// The orthonormal DCT-II of 32 lines by an FFT of n points (Makhoul 1980): 16 lines are its real parts, 16 its imaginary
// parts. load_row(j) returns 32 values, save(k, Complex) stores them.
template <class Load, class Save>
static DR_INLINE void dct(const Lines& plan, float* a, float* b, Load load_row, Save save) {
    const int n = plan.n;
    for (int j = 0; j < n; ++j) store(a + makhoul(j, n) * LINES, load_row(j));
    const float* z = fft(plan, a, b);
    save(0, scaled(load_complex(z), plan.angles[0]));
    for (int k = 1; 2 * k <= n; ++k) {
        const Complex p = load_complex(z + k * LINES), r = load_complex(z + (n - k) * LINES);
        const Vec16 c = broadcast16(plan.angles[2 * k]), s = broadcast16(plan.angles[2 * k + 1]);
        const Vec16 ua = p.re + r.re, va = p.im - r.im, ub = p.im + r.im, vb = r.re - p.re;
        save(k, Complex{mul_add(c, ua, s * va), mul_add(c, ub, s * vb)});
        if (2 * k < n) save(n - k, Complex{s * ua - c * va, s * ub - c * vb});
    }
}
// Its inverse, the orthonormal DCT-III.
template <class Load, class Save>
static DR_INLINE void idct(const Lines& plan, float* a, float* b, Load load_row, Save save) {
    const int n = plan.n;
    // With real and imaginary parts exchanged, the FFT is its own inverse.
    const auto swapped = [](Complex t) { return Complex{t.im, t.re}; };
    store(a, swapped(scaled(load_row(0), plan.angles[0])));
    for (int k = 1; 2 * k <= n; ++k) {
        const Complex x = load_row(k), y = load_row(n - k);
        const Vec16 c = broadcast16(plan.angles[2 * k]), s = broadcast16(plan.angles[2 * k + 1]);
        const Vec16 ua = mul_add(c, x.re, s * y.re), va = s * x.re - c * y.re;
        const Vec16 ub = mul_add(c, x.im, s * y.im), vb = s * x.im - c * y.im;
        store(a + k * LINES, swapped({ua - vb, va + ub}));
        if (2 * k < n) store(a + (n - k) * LINES, swapped({ua + vb, ub - va}));
    }
    const float* z = fft(plan, a, b);
    for (int j = 0; j < n; ++j) save(j, swapped(load_complex(z + makhoul(j, n) * LINES)));
}

}  // namespace DR_ISA
