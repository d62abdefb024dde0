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
    // Hadamard: which of the 32 signed sums of each GROUP of inputs each output uses, for H and for H^T: [n][chunks], a byte
    // for each group of the chunk, 8 times the signs of its inputs as bits.
    static constexpr int GROUP = 5, CHUNK = 8;
    std::vector<std::uint64_t> picks[2];
    int groups() const { return (n + GROUP - 1) / GROUP; }
    int chunks() const { return (groups() + CHUNK - 1) / CHUNK; }
    // The sizes of chunks differ by at most one.
    int first_group(int chunk) const { return chunk * groups() / chunks(); }
};

struct Srm {
    Transform transform;
    int channels, height, width, block, measurements;
    std::vector<std::uint16_t> kept;  // the selected coefficients, a bit each
    std::vector<float> signs;         // or empty
    // The same for the Walsh-Hadamard transform: 16 words for each 32 times 16 signs, the first 16 signs in the top bits.
    std::vector<std::int32_t> sign_bits;
    std::vector<std::int32_t> perm;   // or empty
    Lines along_rows, along_columns;  // lines of `width` and of `height` values
};

enum class Product {
    forward,  // y = A x
    adjoint,  // x = A^T y
    normal,   // A^T A x
    correct,  // x + weight A^T (y - A x), the proximal map of 1/2 ||y - A x||^2
};

struct SrmKernels {
    // x [B, C, H, W], y [B, m], weight [B]; null if the product does not use them.
    void (*apply)(const Srm&, Product, int count, int threads, const float* x, const float* y, const float* weight,
                  float* out);
};

extern const SrmKernels srm_avx512, srm_avx2, srm_portable;

}  // namespace dr
