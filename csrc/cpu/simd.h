// Sixteen floats at a time, in as many registers as the instruction set needs.
//
// Included once per instruction set, inside the namespace DR_ISA, so that no two builds share a symbol.
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define DR_PARTS 1
#define DR_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define DR_PARTS 2
#define DR_LANES 8
#else
#define DR_PARTS 4
#define DR_LANES 4
#endif

#define DR_INLINE inline __attribute__((always_inline))
#define DR_LAMBDA __attribute__((always_inline))

namespace DR_ISA {

typedef float Part __attribute__((vector_size(4 * DR_LANES)));
typedef std::int32_t IntPart __attribute__((vector_size(4 * DR_LANES)));

// One pixel of 16 channels, or 16 pixels of one channel.
struct V {
    Part r[DR_PARTS];
};

#define DR_EACH for (int k = 0; k < DR_PARTS; ++k)

DR_INLINE V load(const float* p) {
    V v;
    DR_EACH std::memcpy(&v.r[k], p + k * DR_LANES, sizeof(Part));
    return v;
}
DR_INLINE void store(float* p, V v) { DR_EACH std::memcpy(p + k * DR_LANES, &v.r[k], sizeof(Part)); }
DR_INLINE V all(float s) {
    V v;
    DR_EACH v.r[k] = s - Part{};
    return v;
}
DR_INLINE V operator+(V a, V b) {
    DR_EACH a.r[k] += b.r[k];
    return a;
}
DR_INLINE V operator-(V a, V b) {
    DR_EACH a.r[k] -= b.r[k];
    return a;
}
DR_INLINE V operator*(V a, V b) {
    DR_EACH a.r[k] *= b.r[k];
    return a;
}
// a * b + c; one rounding where the instruction set has it (-ffp-contract=fast).
DR_INLINE V fma(V a, V b, V c) {
    DR_EACH c.r[k] = a.r[k] * b.r[k] + c.r[k];
    return c;
}
DR_INLINE V clamp(V a, float low, float high) {
    // A NaN stays: minps and maxps return their second operand if either is one; comparisons with it fail.
#if defined(__AVX512F__)
    a.r[0] = (Part)_mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), (__m512)a.r[0]));
#elif defined(__AVX2__)
    DR_EACH a.r[k] = (Part)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)a.r[k]));
#else
    DR_EACH {
        a.r[k] = a.r[k] > high ? high - Part{} : a.r[k];
        a.r[k] = a.r[k] < low ? low - Part{} : a.r[k];
    }
#endif
    return a;
}

DR_INLINE V reciprocal(V a) {
#if defined(__AVX512F__)
    // 14 bits from the table, 28 after one Newton step: below half an ulp of rounding more than a division.
    __m512 x = (__m512)a.r[0];
    __m512 y = _mm512_rcp14_ps(x);
    y = _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y);
    V v;
    v.r[0] = (Part)y;
    return v;
#else
    DR_EACH a.r[k] = 1.0f / a.r[k];
    return a;
#endif
}

// 1 / sqrt(a), correctly rounded twice.
DR_INLINE V rsqrt(V a) {
#if defined(__AVX512F__)
    a.r[0] = 1.0f / (Part)_mm512_sqrt_ps((__m512)a.r[0]);
#else
    DR_EACH for (int j = 0; j < DR_LANES; ++j) a.r[k][j] = 1.0f / __builtin_sqrtf(a.r[k][j]);
#endif
    return a;
}

// e^x for |x| <= 87: 2^n e^r with |r| <= ln(2)/2, a Taylor-like polynomial of degree 6 (relative error 1e-7).
DR_INLINE V exp(V x) {
    DR_EACH {
        Part t = x.r[k] * 1.44269504f + 12582912.0f;
        Part n = t - 12582912.0f;
        Part r = x.r[k] - n * 0.693359375f;
        r = r + n * 2.12194440e-4f;
        Part p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
        IntPart bits;
        std::memcpy(&bits, &t, sizeof t);
        IntPart value;
        std::memcpy(&value, &p, sizeof p);
        value += bits << 23;
        std::memcpy(&x.r[k], &value, sizeof value);
    }
    return x;
}

DR_INLINE V sigmoid(V n) { return reciprocal(all(1.0f) + exp(clamp(all(0.0f) - n, -87.0f, 87.0f))); }

// The 16 sums over the lanes of 16 vectors.
DR_INLINE V sums(const V (&a)[16]) {
#if defined(__AVX512F__)
    __m512 s[8], q[4], h[2];
    for (int i = 0; i < 8; ++i) {
        __m512 x = (__m512)a[2 * i].r[0], y = (__m512)a[2 * i + 1].r[0];
        s[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    for (int i = 0; i < 4; ++i) {
        __m512d x = _mm512_castps_pd(s[2 * i]), y = _mm512_castps_pd(s[2 * i + 1]);
        q[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i)
        h[i] = _mm512_add_ps(_mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(q[2 * i], q[2 * i + 1], 0xdd));
    V v;
    v.r[0] = (Part)_mm512_add_ps(_mm512_shuffle_f32x4(h[0], h[1], 0x88), _mm512_shuffle_f32x4(h[0], h[1], 0xdd));
    return v;
#else
    float out[16];
    for (int i = 0; i < 16; ++i) {
        Part s = a[i].r[0];
        for (int k = 1; k < DR_PARTS; ++k) s += a[i].r[k];
        float t = 0.0f;
        for (int j = 0; j < DR_LANES; ++j) t += s[j];
        out[i] = t;
    }
    return load(out);
#endif
}

}  // namespace DR_ISA
