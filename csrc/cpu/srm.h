// The structurally random matrix D F R, one set of functions per instruction set.
#pragma once
#include <cstdint>
#include <vector>

namespace dr {

enum class Transform { dct, hadamard, walsh };

// A transform of lines of `n` values.
struct Lines {
    int n = 1;
    // DCT: the radices of a complex FFT of n points and its twiddles, pass by pass; cos and sin of pi k / (2 n), scaled.
    std::vector<int> radices;
    std::vector<float> twiddles, angles;
    // Hadamard: which of the 16 signed sums of each 4 inputs goes into each output, [n][groups of 4], of H and of H^T.
    std::vector<std::uint8_t> choice[2];
};

struct Srm {
    Transform transform;
    int channels, height, width, block, measurements;
    std::vector<std::uint16_t> kept;  // the kept coefficients, a bit each
    std::vector<float> signs;         // or empty
    // The same for the Walsh-Hadamard transform: of each 32 times 16 signs 16 words, the first 16 signs in their top bits.
    std::vector<std::int32_t> sign_bits;
    std::vector<std::int32_t> perm;   // or empty
    Lines columns, lines;             // of length `height` and of length `width`
};

enum class Product {
    forward,  // y = A x
    adjoint,  // x = A^T y
    normal,   // A^T A x
    correct,  // x + weight A^T (y - A x), the proximal map of 1/2 ||y - A x||^2
};

struct SrmKernels {
    // x [B, C, H, W], y [B, m], weight [B]; those that a product does not have are null.
    void (*apply)(const Srm&, Product, int count, int threads, const float* x, const float* y, const float* weight,
                  float* out);
};

extern const SrmKernels srm_avx512, srm_avx2, srm_portable;

}  // namespace dr
