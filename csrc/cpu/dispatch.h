// The instruction sets of this machine, and the kernels compiled for each.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_chain.h"

namespace dr {

// The best instruction set comes first.
inline std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
    found.push_back(&portable);
    return found;
}

// The kernels of this machine's best instruction set, or of the one named `isa`.
inline const Kernels& kernels(const std::string& isa) {
    for (const auto* k : supported_kernels())
        if (isa.empty() || isa == k->name) return *k;
    throw std::invalid_argument("instruction set " + isa + " is not of this machine");
}

// The same for a table of other kernels: dispatch(isa, DR_TABLES(srm)).
template <class Table>
const Table& dispatch(const std::string& isa, const Table& avx512, const Table& avx2, const Table& portable) {
    const std::string name = kernels(isa).name;
    return name == "avx512" ? avx512 : name == "avx2" ? avx2 : portable;
}
#if defined(__x86_64__)
#define DR_TABLES(kind) dr::kind##_avx512, dr::kind##_avx2, dr::kind##_portable
#else
#define DR_TABLES(kind) dr::kind##_portable, dr::kind##_portable, dr::kind##_portable
#endif

}  // namespace dr
