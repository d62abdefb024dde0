// SiLU and its derivatives. Included once per instruction set (DR_ISA names it).
#pragma once
#include "simd.h"

namespace DR_ISA {

// 1 / (1 + e^-n). With t = -n / ln 2, e^-n = 2^floor(t) 2^r and a polynomial for 2^r (relative error 7.5e-8).
static DR_INLINE Vec sigmoid(Vec n) {
    const Vec t = clamp(n * -1.44269504f, -120.0f, 100.0f);
#if DR_LANES == 16
    const Vec r = (Vec)_mm512_reduce_ps((__m512)t, 1);
    Vec p = r * 1.8775767e-3f + 8.98934e-3f;
    p = p * r + 5.5826318e-2f;
    p = p * r + 2.4015361e-1f;
    p = p * r + 6.931531e-1f;
    p = p * r + 9.9999994e-1f;
    return reciprocal(1.0f + (Vec)_mm512_scalef_ps((__m512)p, (__m512)t));
#else
    // The nearest integer instead of the floor; adding the constant puts it into the low bits.
    const Vec shifted = t + 12582912.0f, r = t - (shifted - 12582912.0f);
    Vec p = r * 1.3276472e-3f + 9.675541e-3f;
    p = p * r + 5.550713e-2f;
    p = p * r + 2.402212e-1f;
    p = p * r + 6.9314694e-1f;
    p = p * r + 1.0000001f;
    IntVec bits, value;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&value, &p, sizeof value);
    value += bits << 23;
    std::memcpy(&p, &value, sizeof p);
    return reciprocal(1.0f + p);
#endif
}

// SiLU(n) = n sigmoid(n) and its first two derivatives.
struct Silu {
    Vec value, slope, bend;
};
static DR_INLINE Silu silu(Vec n) {
    const Vec s = sigmoid(n), q = 1.0f - s, w = s * q;
    return {n * s, n * w + s, w * (n * (q - s) + 2.0f)};
}

}  // namespace DR_ISA
