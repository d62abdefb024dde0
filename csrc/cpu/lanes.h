// One register of floats: arithmetic of GCC's vector extensions, and operations that they lack.
//
// Included once per instruction set (DR_ISA names it).
#pragma once
#include "simd.h"

namespace DR_ISA {

constexpr int LANES = DR_LANES;

typedef double Double __attribute__((vector_size(8 * DR_LANES)));

static DR_INLINE Part part(const float* p) {
    Part v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static DR_INLINE void put(float* p, Part v) { std::memcpy(p, &v, sizeof v); }
static DR_INLINE Part same(float s) { return s - Part{}; }

// Lanes whose mask has all bits set; zeros elsewhere, even for a NaN.
static DR_INLINE Part masked(Part v, IntPart mask) {
    IntPart bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= mask;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

#if DR_LANES == 16
#define DR_BEFORE 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
#define DR_AFTER 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
#define DR_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define DR_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define DR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define DR_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif DR_LANES == 8
#define DR_BEFORE 7, 8, 9, 10, 11, 12, 13, 14
#define DR_AFTER 1, 2, 3, 4, 5, 6, 7, 8
#define DR_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define DR_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define DR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define DR_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define DR_BEFORE 3, 4, 5, 6
#define DR_AFTER 1, 2, 3, 4
#define DR_LOW 0, 4, 1, 5
#define DR_HIGH 2, 6, 3, 7
#define DR_EVEN 0, 2, 4, 6
#define DR_ODD 1, 3, 5, 7
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define DR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntPart{__VA_ARGS__})
#endif

// Lanes of two neighboring registers, shifted by one: those before `b`; those after `a`.
static DR_INLINE Part before(Part a, Part b) { return DR_SHUFFLE(a, b, DR_BEFORE); }
static DR_INLINE Part after(Part a, Part b) { return DR_SHUFFLE(a, b, DR_AFTER); }
// a0 b0 a1 b1 ..: the first half, the second half.
static DR_INLINE Part low(Part a, Part b) { return DR_SHUFFLE(a, b, DR_LOW); }
static DR_INLINE Part high(Part a, Part b) { return DR_SHUFFLE(a, b, DR_HIGH); }
// The inverses.
static DR_INLINE Part even(Part a, Part b) { return DR_SHUFFLE(a, b, DR_EVEN); }
static DR_INLINE Part odd(Part a, Part b) { return DR_SHUFFLE(a, b, DR_ODD); }

// Transpose a square of registers and lanes, by perfect shuffles.
static DR_INLINE void transpose(Part (&a)[LANES]) {
    Part b[LANES];
#pragma GCC unroll 4
    for (int n = 1; n < LANES; n *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) b[2 * i] = low(a[i], a[i + LANES / 2]), b[2 * i + 1] = high(a[i], a[i + LANES / 2]);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) a[i] = b[i];
    }
}

static DR_INLINE Double wide(Part v) { return __builtin_convertvector(v, Double); }

static DR_INLINE Part clamp(Part a, float least, float most) {
    // Preserves a NaN: minps and maxps return their second operand if either is NaN; comparisons with it fail.
#if DR_LANES == 16
    return (Part)_mm512_max_ps(_mm512_set1_ps(least), _mm512_min_ps(_mm512_set1_ps(most), (__m512)a));
#elif DR_LANES == 8
    return (Part)_mm256_max_ps(_mm256_set1_ps(least), _mm256_min_ps(_mm256_set1_ps(most), (__m256)a));
#else
    a = a > most ? same(most) : a;
    return a < least ? same(least) : a;
#endif
}

static DR_INLINE Part reciprocal(Part a) {
#if DR_LANES == 16
    // 14 bits from the table, 28 after one Newton step: less than half an ulp of rounding more than a division.
    const __m512 x = (__m512)a, y = _mm512_rcp14_ps(x);
    return (Part)_mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y);
#else
    return 1.0f / a;
#endif
}

// 1 / sqrt(a), correctly rounded twice.
static DR_INLINE Part rsqrt(Part a) {
#if DR_LANES == 16
    return 1.0f / (Part)_mm512_sqrt_ps((__m512)a);
#elif DR_LANES == 8
    return 1.0f / (Part)_mm256_sqrt_ps((__m256)a);
#else
    for (int j = 0; j < LANES; ++j) a[j] = __builtin_sqrtf(a[j]);
    return 1.0f / a;
#endif
}

// 1 / (1 + e^-n). With t = -n / ln 2, e^-n = 2^floor(t) 2^r and a polynomial for 2^r (relative error 7.5e-8).
static DR_INLINE Part sigmoid(Part n) {
    const Part t = clamp(n * -1.44269504f, -120.0f, 100.0f);
#if DR_LANES == 16
    const Part r = (Part)_mm512_reduce_ps((__m512)t, 1);
    Part p = r * 1.8775767e-3f + 8.98934e-3f;
    p = p * r + 5.5826318e-2f;
    p = p * r + 2.4015361e-1f;
    p = p * r + 6.931531e-1f;
    p = p * r + 9.9999994e-1f;
    return reciprocal(1.0f + (Part)_mm512_scalef_ps((__m512)p, (__m512)t));
#else
    // The nearest integer instead of the floor; adding the constant puts it into the low bits.
    const Part shifted = t + 12582912.0f, r = t - (shifted - 12582912.0f);
    Part p = r * 1.3276472e-3f + 9.675541e-3f;
    p = p * r + 5.550713e-2f;
    p = p * r + 2.402212e-1f;
    p = p * r + 6.9314694e-1f;
    p = p * r + 1.0000001f;
    IntPart bits, value;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&value, &p, sizeof value);
    value += bits << 23;
    std::memcpy(&p, &value, sizeof p);
    return reciprocal(1.0f + p);
#endif
}

// SiLU(n) = n sigmoid(n) and its first two derivatives.
struct Silu {
    Part value, slope, bend;
};
static DR_INLINE Silu silu(Part n) {
    const Part s = sigmoid(n), q = 1.0f - s, w = s * q;
    return {n * s, n * w + s, w * (n * (q - s) + 2.0f)};
}

}  // namespace DR_ISA
