// Shared parts of the kernels of the structurally random matrix A = D F R: their arguments, and R and D.
#pragma once
#include "dft.cuh"

// Products as in `deepreg_fast.backend.SrmKernels`, and the part of one that a launch computes: all of it or, if an image is
// too large for shared memory, rows, columns and rows again through `scratch`.
enum Product { FORWARD, ADJOINT, NORMAL, CORRECT };
enum Part { ALL, ROWS_IN, COLUMNS, ROWS_OUT };

// The tables built by deepreg_fast/backend/gpu/srm_plan.py: ints, and offsets into `ints` and `floats`.
struct Pass {
    int radix;
    int dense;  // 0, or by a matrix with 8 or 16 outputs per thread
    int inner, twiddles, matrix, transposed;
};
struct Lines {
    int length, passes, last, place, coefficient, angles;
    Pass pass[16];
};
struct Plan {
    int channels, height, width, measurements, row_tile, column_tile, levels, unused;
    Lines along_rows, along_columns;  // lines of `width` and of `height` values
};

// For 32 coefficients: a bit for each selected one, and the number selected before them.
struct alignas(8) Kept {
    unsigned mask, before;
};

struct Call {
    const float *x, *y, *weights;  // [B, d], [B, m], [B]; null if the product does not use it
    float *out, *scratch;          // [B, d] or [B, m], [B, d] or null
    const unsigned char* at_work;  // [B] or null
    const int* perm;               // [d] or null
    const unsigned* signs;         // a bit for each pixel, set for -1; or null
    const Kept* kept;              // for each 32 coefficients
    const int* ints;
    const float* floats;
    float weight;
    int product, part;

    DR_DEVICE const Plan& plan() const { return *reinterpret_cast<const Plan*>(ints); }
    DR_DEVICE int pixels() const { return plan().channels * plan().height * plan().width; }
    // Restrict the call to image number `image`; false if it is inactive.
    DR_DEVICE bool take(int image) {
        if (at_work && !at_work[image]) return false;
        const long long d = pixels(), m = plan().measurements;
        if (x) x += image * d;
        if (y) y += image * m;
        if (weights) weight = weights[image];
        if (scratch) scratch += image * d;
        out += image * (product == FORWARD ? m : d);
        return true;
    }
};
#define SRM_PARAMETERS                                                                                              \
    const float *x, const float *y, const float *weights, float *out, float *scratch, const unsigned char *at_work, \
        const int *perm, const unsigned *signs, const Kept *kept, const int *ints, const float *floats,             \
        float weight, int product, int part
#define SRM_CALL \
    Call { x, y, weights, out, scratch, at_work, perm, signs, kept, ints, floats, weight, product, part }

// v, or -v if the sign of pixel i is -1.
DR_DEVICE float with_sign(const Call& call, int i, float v) {
    return call.signs && call.signs[i >> 5] >> (i & 31) & 1 ? -v : v;
}
// Pixel i of R x.
DR_DEVICE float randomized(const Call& call, int i) { return with_sign(call, i, call.x[call.perm ? call.perm[i] : i]); }
// Position of pixel i of R x in the image, and the image's value there if the product is CORRECT.
struct Origin {
    int at;
    float x;
};
DR_DEVICE Origin origin(const Call& call, int i) {
    const int at = call.perm ? call.perm[i] : i;
    return {at, call.product == CORRECT ? call.x[at] : 0.0f};
}
// Write pixel i of the backward transform to the image: R^T, and the step of CORRECT.
DR_DEVICE void restore(const Call& call, int i, Origin to, float v) {
    v = with_sign(call, i, v);
    call.out[to.at] = call.product == CORRECT ? to.x + call.weight * v : v;
}
// The backward transform's input for coefficient i, given its value `v` in F R x (0 in ADJOINT): y - v, or v without y, or
// zero if the coefficient is not selected. FORWARD also writes v to the output.
DR_DEVICE float selected(const Call& call, int i, float v) {
    const Kept kept = call.kept[i >> 5];
    const unsigned bit = 1u << (i & 31);
    if (!(kept.mask & bit)) return 0.0f;
    const int at = kept.before + bits_set(kept.mask & (bit - 1));
    if (call.product == FORWARD) call.out[at] = v;
    return call.y ? call.y[at] - v : v;
}
