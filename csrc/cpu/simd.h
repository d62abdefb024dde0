// Sixteen floats at a time, in as many registers as the instruction set requires.
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
// For functions called once per piece: inlining would cost more compile time than the calls cost run time.
#define DR_CALL __attribute__((noinline))

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
// a * b + c; one rounding if the instruction set has it (-ffp-contract=fast).
DR_INLINE V fma(V a, V b, V c) {
    DR_EACH c.r[k] = a.r[k] * b.r[k] + c.r[k];
    return c;
}

}  // namespace DR_ISA
