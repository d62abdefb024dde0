// A warp's registers, shared memory and tensor-core products, on a GPU and, for tests without one, on the host.
//
// A value of type Float, Word, Index or Flag is one thread's register on a GPU. On the host it holds the 32 lanes of a warp. A
// block runs in phases, which are functions of the warp's number and end at a barrier. On the host a phase is a loop over the
// warps, in any order; shared memory starts as NaN, and each access is checked: threads that touch a word in one phase may
// only read it.
#pragma once
#include "team.cuh"

#if defined(__CUDACC__)
using Float = float;
using Word = unsigned;
using Index = int;
using Flag = bool;

DR_DEVICE Index lanes() { return static_cast<int>(threadIdx.x & 31); }
DR_DEVICE Float choose(Flag flag, Float yes, Float no) { return flag ? yes : no; }
DR_DEVICE Index choose(Flag flag, Index yes, Index no) { return flag ? yes : no; }
DR_DEVICE bool any_lane(Flag flag) { return flag; }
DR_DEVICE Float fused(Float a, Float b, Float c) { return fmaf(a, b, c); }
DR_DEVICE Index lesser(Index a, int b) { return a < b ? a : b; }
DR_DEVICE Float smaller(Float a, Float b) { return fminf(a, b); }
DR_DEVICE Flag is_finite(Float x) { return fabsf(x) <= 3.40282347e38f; }
DR_DEVICE Float exp2_fast(Float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DR_DEVICE Float reciprocal(Float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DR_DEVICE Float inverse_root(Float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The sum over the four neighboring lanes that share a pixel.
DR_DEVICE Float quad_sum(Float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// Two numbers as pairs of halves, `a + b = high + low`.
DR_DEVICE void split(Word& high, Word& low, Float a, Float b) {
    float x, y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(b), "f"(a));
    asm("{.reg .b16 s, t; mov.b32 {s, t}, %2; cvt.f32.f16 %0, s; cvt.f32.f16 %1, t;}" : "=f"(x), "=f"(y) : "r"(high));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(b - y), "f"(a - x));
}
// d [16 x 8] += a [16 x 16] b [16 x 8], the fragments of mma.m16n8k16.
DR_DEVICE void mma(Float* d, const Word (&a)[4], Word b0, Word b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A thread's place in global memory, which stays one pointer.
using Place = const float*;
DR_DEVICE Place place(const float* from, Index i) { return from + i; }
DR_DEVICE void load4(Float (&x)[4], Place from, int offset) {
    const float4 q = __ldg(reinterpret_cast<const float4*>(from + offset));
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
}
DR_DEVICE Float load(const float* from, Index i, Flag flag) { return flag ? __ldg(from + i) : 0.0f; }
DR_DEVICE void store(float* to, Index i, Float x, Flag flag) {
    if (flag) to[i] = x;
}
DR_DEVICE void store4(float* to, Index i, const Float (&x)[4], Flag flag) {
    if (flag) *reinterpret_cast<float4*>(to + i) = make_float4(x[0], x[1], x[2], x[3]);
}
// The sum of the flagged numbers of lanes 0, 4, 8, ..., in double.
DR_DEVICE void store_sum(double* to, const Float (&x)[2], const Flag (&flag)[2]) {
    double sum = (flag[0] ? static_cast<double>(x[0]) : 0.0) + (flag[1] ? static_cast<double>(x[1]) : 0.0);
    DR_UNROLL for (int n = 4; n < 32; n *= 2) sum += __shfl_xor_sync(~0u, sum, n);
    if ((threadIdx.x & 31) == 0) *to = sum;
}
// The largest of the flagged lanes' positive numbers, kept at `to`.
DR_DEVICE void keep_largest(unsigned* to, Float x, Flag flag) {
    const unsigned most = __reduce_max_sync(~0u, flag ? __float_as_uint(x) : 0u);
    if ((threadIdx.x & 31) == 0 && most) atomicMax(to, most);
}
DR_DEVICE Float larger_size(Float a, Float b) { return fmaxf(fabsf(a), fabsf(b)); }
DR_DEVICE Word load_word(const unsigned* from, Index i, Flag flag) { return flag ? __ldg(from + i) : 0u; }
DR_DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
DR_DEVICE float from_bits(unsigned x) { return __uint_as_float(x); }
DR_DEVICE Word word_of(Float x) { return __float_as_uint(x); }
DR_DEVICE Float float_of(Word x) { return __uint_as_float(x); }

// Shared memory, with places in bytes.
struct Shared {
    unsigned* words;
    template <class T>
    DR_DEVICE T* at(Index i) const {
        return reinterpret_cast<T*>(reinterpret_cast<char*>(words) + i);
    }
    DR_DEVICE Word get(Index i) const { return *at<unsigned>(i); }
    DR_DEVICE Word get(Index i, Flag flag) const { return flag ? *at<unsigned>(i) : 0u; }
    DR_DEVICE void get4(Word (&x)[4], Index i) const {
        const uint4 q = *at<uint4>(i);
        x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
    }
    DR_DEVICE void put(Index i, Word x, Flag flag) const {
        if (flag) *at<unsigned>(i) = x;
    }
    // Four 8 x 8 matrices of halves; lane 8 m + r has the place of row r of matrix m.
    DR_DEVICE void matrices(Word (&x)[4], Index i) const {
        const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(words)) + i;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(place));
    }
};
struct Block {
    int warps;
    template <class Phase>
    DR_DEVICE void each(Phase phase) const {
        phase(static_cast<int>(threadIdx.x >> 5));
        __syncthreads();
    }
};

#else
#include "warp_host.cuh"
#endif
