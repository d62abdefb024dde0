// 32 lines side by side in registers: 16 are the real parts and 16 the imaginary parts of complex numbers. Included once per
// instruction set (DR_ISA names it).
#pragma once
#include <cstddef>

#include "simd.h"

namespace DR_ISA {

constexpr int LINES = 32;

struct Complex {
    Vec16 re, im;
};
static DR_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
static DR_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
static DR_INLINE Complex scaled(Complex a, float s) { return {a.re * broadcast16(s), a.im * broadcast16(s)}; }
// a + b s.
static DR_INLINE Complex add_scaled(Complex a, Complex b, float s) {
    return {mul_add(b.re, broadcast16(s), a.re), mul_add(b.im, broadcast16(s), a.im)};
}
// a - i b and a + i b.
static DR_INLINE Complex minus_i(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }
static DR_INLINE Complex plus_i(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }
static DR_INLINE Complex load_complex(const float* p) { return {load16(p), load16(p + 16)}; }
static DR_INLINE void store(float* p, Complex a) {
    store(p, a.re);
    store(p + 16, a.im);
}

// 16 x 16 floats, transposed: how rows of an image become lines, and lines rows.
static DR_INLINE void transpose16(const float* in, std::size_t in_stride, float* out, std::size_t out_stride) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    const auto lo = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto hi = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    for (int i = 0; i < 4; ++i) {
        a[4 * i] = lo(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = hi(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = lo(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = hi(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 p = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), q = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        const __m512 r = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88), s = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_ps(out + i * out_stride, _mm512_shuffle_f32x4(p, r, 0x88));
        _mm512_storeu_ps(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(q, s, 0x88));
        _mm512_storeu_ps(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(p, r, 0xdd));
        _mm512_storeu_ps(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(q, s, 0xdd));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

}  // namespace DR_ISA
