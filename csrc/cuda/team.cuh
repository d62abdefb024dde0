// Macros and types to compile one source for a GPU by NVRTC and, for tests without a GPU, for the host by a C++ compiler.
//
// A block runs in phases: a phase is a function of the thread's number and ends at a barrier. On the host a phase is a loop
// over the threads, in any order: a result that depends on the order reveals a race.
#pragma once

#if defined(__CUDACC__)
#define DR_DEVICE __device__ __forceinline__
#define DR_UNROLL _Pragma("unroll")
#define DR_ROLLED _Pragma("unroll 1")

struct Team {
    int size;  // threads, a multiple of 32

    template <class Phase>
    DR_DEVICE void each(Phase phase) const {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
    // Two phases; a thread's `Own` stays in its registers across the barrier between them.
    template <class Own, class First, class Second>
    DR_DEVICE void twice(First first, Second second) const {
        Own own;
        first(static_cast<int>(threadIdx.x), own);
        __syncthreads();
        second(static_cast<int>(threadIdx.x), own);
        __syncthreads();
    }
};

DR_DEVICE int bits_set(unsigned word) { return __popc(word); }

#else
#include <vector>

#define DR_DEVICE inline
#define DR_UNROLL _Pragma("GCC unroll 16")
#define DR_ROLLED

struct Team {
    int size;
    int order;  // of the threads in a phase: 0 ascending, 1 descending, 2 a new random order in each phase
    unsigned* state;

    std::vector<int> threads() const {
        std::vector<int> all(size);
        for (int i = 0; i < size; ++i) all[i] = order == 1 ? size - 1 - i : i;
        for (int i = size - 1; order == 2 && i > 0; --i) {
            *state = *state * 1664525u + 1013904223u;
            const int other = static_cast<int>((*state >> 8) % (i + 1u)), kept = all[i];
            all[i] = all[other], all[other] = kept;
        }
        return all;
    }
    template <class Phase>
    void each(Phase phase) const {
        for (const int thread : threads()) phase(thread);
    }
    template <class Own, class First, class Second>
    void twice(First first, Second second) const {
        std::vector<Own> own(size);
        for (const int thread : threads()) first(thread, own[thread]);
        for (const int thread : threads()) second(thread, own[thread]);
    }
};

DR_DEVICE int bits_set(unsigned word) { return __builtin_popcount(word); }
#endif
