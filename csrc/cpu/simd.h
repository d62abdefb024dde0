// SIMD registers of floats. Their arithmetic is that of GCC's vector extensions (a + b, a * s, a < b); here are loads, stores
// and the operations that the extensions lack.
//
// Included once per instruction set, inside the namespace DR_ISA, so that no two builds share a symbol.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define DR_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define DR_LANES 8
#else
#define DR_LANES 4
#endif

#define DR_INLINE inline __attribute__((always_inline))
#define DR_LAMBDA __attribute__((always_inline))
// For functions called once per piece: inlining would cost more compile time than the calls cost run time.
#define DR_CALL __attribute__((noinline))

namespace DR_ISA {

constexpr int LANES = DR_LANES;

// One register; `DoubleVec` is two, because a `Vec` converts to it.
typedef float Vec __attribute__((vector_size(4 * DR_LANES)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * DR_LANES)));
typedef double DoubleVec __attribute__((vector_size(8 * DR_LANES)));

static DR_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static DR_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static DR_INLINE Vec broadcast(float s) { return s - Vec{}; }

// Lanes whose mask has all bits set; zeros elsewhere, even for a NaN.
static DR_INLINE Vec masked(Vec v, IntVec mask) {
    IntVec bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= mask;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
// The mask of the lanes j with first + j < end.
static DR_INLINE IntVec lanes_below(int first, int end) {
    IntVec lane;
    for (int j = 0; j < LANES; ++j) lane[j] = first + j;
    return lane < end;
}

static DR_INLINE DoubleVec to_double(Vec v) { return __builtin_convertvector(v, DoubleVec); }
// The sum of the lanes, in order.
static DR_INLINE double sum_lanes(DoubleVec v) {
    double total = 0.0;
    for (int j = 0; j < LANES; ++j) total += v[j];
    return total;
}

#if DR_LANES == 16
#define DR_PREVIOUS 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
#define DR_NEXT 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
#define DR_INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define DR_INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define DR_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define DR_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif DR_LANES == 8
#define DR_PREVIOUS 7, 8, 9, 10, 11, 12, 13, 14
#define DR_NEXT 1, 2, 3, 4, 5, 6, 7, 8
#define DR_INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define DR_INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define DR_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define DR_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define DR_PREVIOUS 3, 4, 5, 6
#define DR_NEXT 1, 2, 3, 4
#define DR_INTERLEAVE_LOW 0, 4, 1, 5
#define DR_INTERLEAVE_HIGH 2, 6, 3, 7
#define DR_EVEN 0, 2, 4, 6
#define DR_ODD 1, 3, 5, 7
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define DR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// Lanes of two neighboring registers, shifted by one: those before the lanes of `b`; those after the lanes of `a`.
static DR_INLINE Vec previous_lanes(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_PREVIOUS); }
static DR_INLINE Vec next_lanes(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_NEXT); }
// a0 b0 a1 b1 ..: the first half, the second half.
static DR_INLINE Vec interleave_low(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_INTERLEAVE_LOW); }
static DR_INLINE Vec interleave_high(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_INTERLEAVE_HIGH); }
// The inverses.
static DR_INLINE Vec even_lanes(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_EVEN); }
static DR_INLINE Vec odd_lanes(Vec a, Vec b) { return DR_SHUFFLE(a, b, DR_ODD); }

// Transpose a square of registers and lanes, by perfect shuffles.
static DR_INLINE void transpose(Vec (&a)[LANES]) {
    Vec b[LANES];
#pragma GCC unroll 4
    for (int n = 1; n < LANES; n *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            b[2 * i] = interleave_low(a[i], a[i + LANES / 2]);
            b[2 * i + 1] = interleave_high(a[i], a[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) a[i] = b[i];
    }
}

static DR_INLINE Vec clamp(Vec a, float least, float most) {
    // Preserves a NaN: minps and maxps return their second operand if either is NaN; comparisons with it fail.
#if DR_LANES == 16
    return (Vec)_mm512_max_ps(_mm512_set1_ps(least), _mm512_min_ps(_mm512_set1_ps(most), (__m512)a));
#elif DR_LANES == 8
    return (Vec)_mm256_max_ps(_mm256_set1_ps(least), _mm256_min_ps(_mm256_set1_ps(most), (__m256)a));
#else
    a = a > most ? broadcast(most) : a;
    return a < least ? broadcast(least) : a;
#endif
}

static DR_INLINE Vec reciprocal(Vec a) {
#if DR_LANES == 16
    // 14 bits from the table, 28 after one Newton step: less than half an ulp of rounding more than a division.
    const __m512 x = (__m512)a, y = _mm512_rcp14_ps(x);
    return (Vec)_mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y);
#else
    return 1.0f / a;
#endif
}

static DR_INLINE Vec sqrt(Vec a) {
#if DR_LANES == 16
    return (Vec)_mm512_sqrt_ps((__m512)a);
#elif DR_LANES == 8
    return (Vec)_mm256_sqrt_ps((__m256)a);
#else
    for (int j = 0; j < LANES; ++j) a[j] = __builtin_sqrtf(a[j]);
    return a;
#endif
}
// Rounded twice.
static DR_INLINE Vec rsqrt(Vec a) { return 1.0f / sqrt(a); }

// Sixteen floats under every instruction set, in as many registers as it requires.
constexpr int REGISTERS = 16 / LANES;
struct Vec16 {
    Vec r[REGISTERS];
};
#define DR_EACH_REGISTER for (int k = 0; k < REGISTERS; ++k)

// By memcpy into the array: through `load` and `broadcast` GCC makes a few more moves of it.
static DR_INLINE Vec16 load16(const float* p) {
    Vec16 v;
    DR_EACH_REGISTER std::memcpy(&v.r[k], p + k * LANES, sizeof(Vec));
    return v;
}
static DR_INLINE void store(float* p, Vec16 v) { DR_EACH_REGISTER std::memcpy(p + k * LANES, &v.r[k], sizeof(Vec)); }
static DR_INLINE Vec16 broadcast16(float s) {
    Vec16 v;
    DR_EACH_REGISTER v.r[k] = s - Vec{};
    return v;
}
static DR_INLINE Vec16 operator+(Vec16 a, Vec16 b) {
    DR_EACH_REGISTER a.r[k] += b.r[k];
    return a;
}
static DR_INLINE Vec16 operator-(Vec16 a, Vec16 b) {
    DR_EACH_REGISTER a.r[k] -= b.r[k];
    return a;
}
static DR_INLINE Vec16 operator*(Vec16 a, Vec16 b) {
    DR_EACH_REGISTER a.r[k] *= b.r[k];
    return a;
}
// a * b + c; one rounding if the instruction set has it (-ffp-contract=fast).
static DR_INLINE Vec16 mul_add(Vec16 a, Vec16 b, Vec16 c) {
    DR_EACH_REGISTER c.r[k] = a.r[k] * b.r[k] + c.r[k];
    return c;
}

// Eight doubles under every instruction set: sums over these lanes have the same order everywhere.
typedef double DoubleVec8 __attribute__((vector_size(64)));
// Eight floats, converted.
static DR_INLINE DoubleVec8 load8_to_double(const float* p) {
    typedef float Vec8 __attribute__((vector_size(32)));
    Vec8 v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, DoubleVec8);
}

}  // namespace DR_ISA
