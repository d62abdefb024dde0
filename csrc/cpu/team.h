// A loop over independent pieces of work, on a team of OpenMP threads. Included once per instruction set (DR_ISA).
#pragma once
#include <algorithm>
#include <new>

#include "subnormals.h"

#if defined(__SANITIZE_THREAD__)
// libgomp is not built for the thread sanitizer, which therefore does not detect that a team starts after, and ends before,
// the surrounding code.
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#define DR_TSAN_ACQUIRE(p) __tsan_acquire(p)
#define DR_TSAN_RELEASE(p) __tsan_release(p)
#else
#define DR_TSAN_ACQUIRE(p)
#define DR_TSAN_RELEASE(p)
#endif

namespace DR_ISA {

// Call work(i) once for each i in 0 .. count - 1, in any order; rethrows an out-of-memory error of a thread.
template <class F>
static void parallel_for(int count, int threads, F work) {
    struct {
        F& work;
        bool failed;
    } job{work, false};
    auto* shared = &job;  // shared data is behind one pointer, passed by value
    DR_TSAN_RELEASE(shared);
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::max(1, std::min(threads, count))) firstprivate(shared)
    for (int i = 0; i < count; ++i) {
        DR_TSAN_ACQUIRE(shared);
        const dr::Subnormals all;
        try {
            shared->work(i);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            shared->failed = true;
        }
        DR_TSAN_RELEASE(&shared->failed);
    }
    DR_TSAN_ACQUIRE(&job.failed);
    if (job.failed) throw std::bad_alloc();
}

}  // namespace DR_ISA
