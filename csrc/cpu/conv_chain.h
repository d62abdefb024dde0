// The conv chain's sweeps, one set of functions per instruction set.
#pragma once
#include <cstdint>

namespace dr {

constexpr int MAX_DEPTH = 16;

// How the filters of a convolution are laid out, after the loop that reads them: 1 -> C, C -> C (two ways), C -> 1.
enum class Form { expand, direct, winograd, reduce };

// What `pack` has to know of one convolution.
struct Layer {
    int out, in;
    double scale;  // of the filters: the input gain or its inverse
    bool centred;  // over the outputs: a LayerNorm over channels follows
};

// h: conv 1 -> C, [LayerNorm over channels], SiLU, (conv C -> C, ...) x (depth - 2), conv C -> 1; 3 x 3 filters, zero
// padding. Channels are padded with zeros to a multiple of 16.
struct Chain {
    int depth;
    int channels;
    int blocks;     // of 16 channels
    int head;       // 0 red, 1 residual, 2 norm
    bool norm;      // LayerNorm over the channels of each pixel
    bool winograd;  // for the inner convolutions
    float alpha, center, eps;
    const float* forward[MAX_DEPTH];   // packed filters of each convolution
    const float* backward[MAX_DEPTH];  // the same for its transpose
    const float* bias[MAX_DEPTH];
    const float* gamma[MAX_DEPTH];     // of each LayerNorm
    const float* beta[MAX_DEPTH];
};

struct Batch {
    int count, height, width, threads;
};

// What the gradient's sweep keeps for the products (docs/kernels.md), all null or none:
struct Kept {
    float* planes;   // [B, depth - 1, 2, H, W, 16 blocks]: what enters gamma . + beta and SiLU; the cotangent above SiLU
    float* scalars;  // [B, depth - 1, 2, H, W], with a LayerNorm: rs = 1 / sqrt(var + eps); m2 = mean(t xhat)
    float* h;        // [B, H, W]
};

struct Kernels {
    const char* name;
    void (*pack)(const float* w, const Layer&, bool transpose, Form, float* packed);
    // value [B], grad [B, H, W].
    void (*gradient)(const Chain&, const Batch&, const float* x, double* value, float* grad, const Kept&);
    void (*hvp)(const Chain&, const Batch&, const float* v, const Kept&, float* out);
    // d/dtheta sum_b <grad r(x_b), v_b>: for each convolution [C_out, C_in, 9] then its bias [C_out]; with a LayerNorm
    // then for each gamma [C] and beta [C].
    void (*param_vjp)(const Chain&, const Batch&, const float* x, const float* v, const Kept&, double* out);
    // What the multiply-add units can do: `count` rounds of independent ones on each thread; returns the flops.
    double (*multiply_adds)(int threads, long count, float* sink);
};

extern const Kernels avx512, avx2, portable;

}  // namespace dr
