// Discrete Fourier transforms of 1 to 16 points and Walsh-Hadamard transforms of 2 to 16, in registers.
#pragma once
#include "team.cuh"

struct Complex {
    float re, im;
};
DR_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
DR_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
DR_DEVICE Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
DR_DEVICE Complex minus_i(Complex a) { return {a.im, -a.re}; }

// exp(-2 pi i k / R), computed in float64 by Taylor's series at compile time.
template <int R>
struct Roots {
    float re[R], im[R];
    DR_DEVICE constexpr Roots() : re(), im() {
        for (int k = 0; k < R; ++k) {
            const double angle = -2.0 * 3.14159265358979323846 * (2 * k > R ? k - R : k) / R;
            double c = 0.0, s = 0.0, term = 1.0;
            for (int i = 0; i < 30; ++i) {
                (i % 2 ? s : c) += i % 4 < 2 ? term : -term;
                term *= angle / (i + 1);
            }
            re[k] = static_cast<float>(c), im[k] = static_cast<float>(s);
        }
    }
};

// The first factor of R: the full power of its smallest prime; for a power of a prime, about its square root; for a prime, R.
DR_DEVICE constexpr int first_factor(int R) {
    int p = 2;
    while (R % p) ++p;
    int power = 1;
    while (R % (power * p) == 0) power *= p;
    if (power < R || p == R) return power;
    int root = p;
    while (root * root * p * p <= R) root *= p;
    return root;
}
DR_DEVICE constexpr bool coprime(int a, int b) {
    for (int k = 2; k <= a; ++k)
        if (a % k == 0 && b % k == 0) return false;
    return true;
}
// x with a x = 1 modulo b.
DR_DEVICE constexpr int inverse_of(int a, int b) {
    int x = 1;
    while (a * x % b != 1 % b) ++x;
    return x;
}

template <int R>
DR_DEVICE void dft(Complex (&t)[R]);

// R = A B: by Good and Thomas without twiddles if A and B are coprime, otherwise by Cooley and Tukey.
template <int R, int A, int B>
DR_DEVICE void dft_product(Complex (&t)[R]) {
    constexpr bool COPRIME = coprime(A, B);
    constexpr int FIRST = COPRIME ? B * inverse_of(B, A) : 1, SECOND = COPRIME ? A * inverse_of(A, B) : A;
    constexpr Roots<R> roots;
    Complex u[B][A];
    DR_UNROLL for (int j = 0; j < B; ++j) {
        DR_UNROLL for (int i = 0; i < A; ++i) u[j][i] = t[COPRIME ? (B * i + A * j) % R : B * i + j];
        dft<A>(u[j]);
        DR_UNROLL for (int i = 0; i < A; ++i) {
            if (!COPRIME && i > 0 && j > 0) {
                if (4 * i * j == R)
                    u[j][i] = minus_i(u[j][i]);
                else
                    u[j][i] = u[j][i] * Complex{roots.re[i * j % R], roots.im[i * j % R]};
            }
        }
    }
    DR_UNROLL for (int i = 0; i < A; ++i) {
        Complex v[B];
        DR_UNROLL for (int j = 0; j < B; ++j) v[j] = u[j][i];
        dft<B>(v);
        DR_UNROLL for (int j = 0; j < B; ++j) t[(FIRST * i + SECOND * j) % R] = v[j];
    }
}

// An odd prime R: sums and differences of t[k] and t[R - k].
template <int R>
DR_DEVICE void dft_prime(Complex (&t)[R]) {
    constexpr int H = R / 2;
    constexpr Roots<R> roots;
    Complex sum[H], difference[H], out[R];
    out[0] = t[0];
    DR_UNROLL for (int k = 0; k < H; ++k) {
        sum[k] = t[k + 1] + t[R - 1 - k], difference[k] = t[k + 1] - t[R - 1 - k];
        out[0] = out[0] + sum[k];
    }
    DR_UNROLL for (int j = 1; j <= H; ++j) {
        Complex even = t[0], odd = {0.0f, 0.0f};
        DR_UNROLL for (int k = 0; k < H; ++k) {
            const float c = roots.re[j * (k + 1) % R], s = roots.im[j * (k + 1) % R];
            even = {even.re + c * sum[k].re, even.im + c * sum[k].im};
            odd = {odd.re + s * difference[k].re, odd.im + s * difference[k].im};
        }
        out[j] = {even.re - odd.im, even.im + odd.re}, out[R - j] = {even.re + odd.im, even.im - odd.re};
    }
    DR_UNROLL for (int j = 0; j < R; ++j) t[j] = out[j];
}

// t[k] <- sum_j t[j] exp(-2 pi i j k / R).
template <int R>
DR_DEVICE void dft(Complex (&t)[R]) {
    if constexpr (R == 1) {
    } else if constexpr (R == 2) {
        const Complex a = t[0];
        t[0] = a + t[1], t[1] = a - t[1];
    } else if constexpr (R == 4) {
        const Complex a = t[0] + t[2], b = t[0] - t[2], c = t[1] + t[3], d = minus_i(t[1] - t[3]);
        t[0] = a + c, t[1] = b + d, t[2] = a - c, t[3] = b - d;
    } else if constexpr (first_factor(R) == R) {
        dft_prime<R>(t);
    } else {
        dft_product<R, first_factor(R), R / first_factor(R)>(t);
    }
}

// t <- H t with Sylvester's Hadamard matrix of order R; only the levels of the lowest `levels` of its log2(R) bits.
template <int R, class T>
DR_DEVICE void walsh(T (&t)[R], int levels = 30) {
    DR_UNROLL for (int bit = 1, level = 0; bit < R; bit *= 2, ++level) {
        if (level < levels) {
            DR_UNROLL for (int i = 0; i < R; ++i) {
                if (!(i & bit)) {
                    const T a = t[i];
                    t[i] = a + t[i + bit], t[i + bit] = a - t[i + bit];
                }
            }
        }
    }
}
