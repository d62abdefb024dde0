// Selection of coefficients: AVX-512's compress and expand, and their counterparts elsewhere. Included once per instruction set
// (DR_ISA names it).
#pragma once
#include "simd.h"

namespace DR_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each 8 bits: the indices of the selected lanes; the number of selected lanes before each; all ones in the selected lanes.
struct alignas(32) SelectTables {
    std::int32_t compress[256][8] = {}, expand[256][8] = {}, mask[256][8] = {};
    constexpr SelectTables() {
        for (int bits = 0; bits < 256; ++bits)
            for (int j = 0, n = 0; j < 8; ++j)
                if (bits >> j & 1) {
                    mask[bits][j] = -1;
                    expand[bits][j] = n;
                    compress[bits][n++] = j;
                }
    }
};
static constexpr SelectTables SELECT;
static DR_INLINE __m256i load_table(const std::int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
static DR_INLINE __m256 and_mask(__m256 v, const std::int32_t* mask) {
    return _mm256_and_ps(_mm256_castsi256_ps(load_table(mask)), v);
}
// The first n lanes.
static DR_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Write the selected ones of 16 coefficients contiguously to `out`, which ends at `end`; returns the next position.
// FULL: the end is at least 16 away.
template <bool FULL = false>
static DR_INLINE float* compress_store(float* out, const float* end, Vec16 v, unsigned kept) {
    const int n = __builtin_popcount(kept);
#if defined(__AVX512F__)
    // The next store overwrites the excess of a full store.
    const __m512 packed = _mm512_maskz_compress_ps(static_cast<__mmask16>(kept), (__m512)v.r[0]);
    if (FULL || end - out >= 16)
        _mm512_storeu_ps(out, packed);
    else
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << n) - 1), packed);
#elif defined(__AVX2__)
    float* to = out;
    DR_EACH_REGISTER {
        const unsigned bits = kept >> 8 * k & 255;
        const int count = __builtin_popcount(bits);
        const __m256 packed = _mm256_permutevar8x32_ps((__m256)v.r[k], load_table(SELECT.compress[bits]));
        if (FULL || end - to >= 8)
            _mm256_storeu_ps(to, packed);
        else
            _mm256_maskstore_ps(to, first_lanes(count), packed);
        to += count;
    }
#else
    (void)end;
    float all16[16];
    store(all16, v);
    for (float* p = out; kept; kept &= kept - 1) *p++ = all16[__builtin_ctz(kept)];
#endif
    return out + n;
}
// The inverse: 16 coefficients, zero if not selected; advances `y`.
template <bool FULL = false>
static DR_INLINE Vec16 expand_load(const float*& y, const float* end, unsigned kept) {
    const int n = __builtin_popcount(kept);
    Vec16 v;
#if defined(__AVX512F__)
    const auto rest = static_cast<__mmask16>((1u << n) - 1);
    __m512 packed = FULL || end - y >= 16 ? _mm512_loadu_ps(y) : _mm512_maskz_loadu_ps(rest, y);
    __asm__("" : "+v"(packed));  // expanding from memory is microcode on some processors
    v.r[0] = (Vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(kept), packed);
#elif defined(__AVX2__)
    const float* from = y;
    DR_EACH_REGISTER {
        const unsigned bits = kept >> 8 * k & 255;
        const int count = __builtin_popcount(bits);
        const __m256 packed = FULL || end - from >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(count));
        v.r[k] = (Vec)and_mask(_mm256_permutevar8x32_ps(packed, load_table(SELECT.expand[bits])), SELECT.mask[bits]);
        from += count;
    }
#else
    (void)end;
    float all16[16] = {};
    for (const float* p = y; kept; kept &= kept - 1) all16[__builtin_ctz(kept)] = *p++;
    v = load16(all16);
#endif
    y += n;
    return v;
}
// The selected ones of 16 coefficients; zeros elsewhere.
static DR_INLINE Vec16 masked(Vec16 v, unsigned kept) {
#if defined(__AVX512F__)
    v.r[0] = (Vec)_mm512_maskz_mov_ps(kept, (__m512)v.r[0]);
#elif defined(__AVX2__)
    DR_EACH_REGISTER v.r[k] = (Vec)and_mask((__m256)v.r[k], SELECT.mask[kept >> 8 * k & 255]);
#else
    DR_EACH_REGISTER {
        IntVec bit, bits;
        for (int j = 0; j < LANES; ++j) bit[j] = 1 << (k * LANES + j);
        std::memcpy(&bits, &v.r[k], sizeof bits);
        bits &= (static_cast<std::int32_t>(kept) & bit) == bit;
        std::memcpy(&v.r[k], &bits, sizeof bits);
    }
#endif
    return v;
}

}  // namespace DR_ISA
