// The Python module deepreg_fast._cpu. Tensors are passed as Python objects, so one build serves every release of PyTorch;
// dtype, device, layout and size of each are checked before its memory is touched (tensor.h).
#ifdef __unix__
#include <pthread.h>
#endif

#include "bindings_conv_chain.h"
#include "bindings_ridge.h"
#include "bindings_srm.h"
#include "bindings_tomography.h"
#include "bindings_tv.h"
#include "bindings_vectors.h"

namespace bindings = dr::bindings;
namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels for the CPU.";
#ifdef __unix__
    pthread_atfork(nullptr, nullptr, [] { bindings::forked = true; });
#endif
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto* k : dr::supported_kernels()) names.emplace_back(k->name);
        return names;
    });
    m.def("multiply_adds", [](const std::string& isa, int threads, int scale) {
        py::gil_scoped_release free;
        float sink = 0.0f;
        return dr::kernels(isa).multiply_adds(bindings::team(threads), 2000000L * scale, &sink);
    });
    bindings::bind_conv_chain(m);
    bindings::bind_srm(m);
    bindings::bind_ridge(m);
    bindings::bind_tomography(m);
    bindings::bind_tv(m);
    bindings::bind_vectors(m);
}
