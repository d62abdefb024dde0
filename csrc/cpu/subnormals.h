// Numbers below 2^-126. A program can set its processor to flush them to zero (torch.set_flush_denormal). The setting is a
// bit of each thread, so results would depend on the thread that computed them.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dr {

// During its lifetime, this thread computes with subnormals.
class Subnormals {
  public:
    Subnormals() : before_(state()) {
        if (before_ & FLUSH) set(before_ & ~FLUSH);
    }
    ~Subnormals() {
        if (before_ & FLUSH) set(before_);
    }
    Subnormals(const Subnormals&) = delete;
    Subnormals& operator=(const Subnormals&) = delete;

  private:
#if defined(__x86_64__)
    static constexpr std::uint64_t FLUSH = 0x8040;  // results and operands
    static std::uint64_t state() { return _mm_getcsr(); }
    static void set(std::uint64_t bits) {
        _mm_setcsr(static_cast<unsigned>(bits));
        asm volatile("" ::: "memory");  // later code reads its operands after this
    }
#elif defined(__aarch64__)
    static constexpr std::uint64_t FLUSH = 1u << 24;
    static std::uint64_t state() {
        std::uint64_t bits;
        asm volatile("mrs %0, fpcr" : "=r"(bits));
        return bits;
    }
    static void set(std::uint64_t bits) { asm volatile("msr fpcr, %0" ::"r"(bits) : "memory"); }
#else
    static constexpr std::uint64_t FLUSH = 0;
    static std::uint64_t state() { return 0; }
    static void set(std::uint64_t) {}
#endif

    std::uint64_t before_;
};

}  // namespace dr
