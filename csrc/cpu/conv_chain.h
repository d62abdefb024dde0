// The conv chain's sweeps, one set of functions per instruction set.
#pragma once
#include <cstdint>

namespace dr {

// h: conv 1 -> C, SiLU, (conv C -> C, SiLU) x (depth - 2), conv C -> 1; 3 x 3 filters, zero padding.
// Weights are packed by `pack` (see conv_chain.inc); channels are padded to a multiple of 16.
struct Chain {
    int depth;
    int channels;
    int blocks;                // of 16 channels
    int head;                  // 0 red, 1 residual, 2 norm
    float alpha, center;
    const float* forward[16];  // packed filters of each convolution
    const float* backward[16]; // the same for its transpose
    const float* bias[16];     // padded with zeros
};

// 1 -> C, C -> C and C -> 1: three loops, and three packed forms (a network may have C = 1).
enum class Kind { expand, mix, reduce };

struct Batch {
    int count, height, width, threads;
};

struct Kernels {
    const char* name;
    // Filters `[C_out, C_in, 3, 3]` to the packed form of the convolution or of its transpose.
    void (*pack)(const float* w, int out, int in, bool transpose, Kind kind, float scale, float* packed);
    // value [B], grad [B, H, W]; planes [B, 2 (depth - 1), H, W, 16 blocks] (or null): SiLU' and (cotangent SiLU'').
    void (*gradient)(const Chain&, const Batch&, const float* x, double* value, float* grad, float* planes);
    void (*hvp)(const Chain&, const Batch&, const float* v, const float* planes, float* out);
    // d/dtheta sum_b <grad r(x_b), v_b>: for each convolution [C_out, C_in, 9] then its bias [C_out], in doubles.
    void (*param_vjp)(const Chain&, const Batch&, const float* x, const float* v, double* out);
};

extern const Kernels avx512, avx2, portable;

}  // namespace dr
