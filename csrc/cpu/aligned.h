// Memory on cache-line boundaries. Included once per instruction set (DR_ISA names it).
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace DR_ISA {

// Zeroed floats on cache-line boundaries, so that a pixel of 16 channels lies in one line.
template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

}  // namespace DR_ISA
