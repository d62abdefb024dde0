// The Python class Vectors.
#pragma once

#include "bindings.h"
#include "vectors.h"

namespace dr::bindings {

// The solvers' vector operations.
class Vectors {
  public:
    explicit Vectors(const std::string& isa) : kernels_(&dr::dispatch(isa, DR_TABLES(vectors))) {}

    // `n` numbers of each of `count` images.
    void dot(int count, std::size_t n, int threads, py::handle a, py::handle b, py::handle out) const {
        const std::size_t all = total(count, n);
        run([&, a = in(a, all, "a"), b = in(b, all, "b"), sums = dr::memory<double>(out, count, "out")] {
            kernels_->dot(count, n, team(threads), a, b, sums);
        });
    }
    void add(int count, std::size_t n, int threads, py::handle x, py::handle s, py::handle p, py::handle rows, py::handle out,
             py::handle size) const {
        const std::size_t all = total(count, n);
        run([&, x = in(x, all, "x"), s = in(s, count, "s"), p = in(p, all, "p"), rows = flags(rows, count, "rows"),
             out = dr::memory<float>(out, all, "out"), size = dr::memory<double>(size, count, "size")] {
            kernels_->add(count, n, team(threads), x, s, p, rows, out, size);
        });
    }
    // `idx` are indices into the `batch` images of x and g.
    void secant(int count, std::size_t n, int threads, py::handle idx, int batch, py::handle candidate, py::handle candidate_g,
                py::handle x, py::handle g, py::handle out) const {
        const std::size_t all = total(count, n), of_batch = total(batch, n);
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        run([&, c = in(candidate, all, "candidate"), cg = in(candidate_g, all, "candidate_g"), x = in(x, of_batch, "x"),
             g = in(g, of_batch, "g"), sums = dr::memory<double>(out, 4 * static_cast<std::size_t>(count), "out")] {
            kernels_->secant(active, c, cg, x, g, sums);
        });
    }
    // `state` of `batch` images: dx, df [batch, memory, n], x, f [batch, n].
    void remember(int count, std::size_t n, int threads, py::handle idx, int batch, int memory, const Tensors& state,
                  py::handle slot, py::handle fresh, py::handle x, py::handle f, py::handle gram, py::handle rhs) const {
        const std::size_t all = total(count, n), products = static_cast<std::size_t>(count) * memory;
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        const dr::AndersonHistory history = anderson_history(batch, n, memory, state);
        run([&, slot = dr::indices(slot, count, memory, "slot"), fresh = flags(fresh, count, "fresh"), x = in(x, all, "x"),
             f = in(f, all, "f"), gram = dr::memory<double>(gram, products, "gram"),
             rhs = dr::memory<double>(rhs, products, "rhs")] {
            kernels_->remember(active, history, slot, fresh, x, f, gram, rhs);
        });
    }
    void combine(int count, std::size_t n, int threads, py::handle idx, int batch, int memory, const Tensors& state,
                 py::handle c, py::handle limit, py::handle x, py::handle f, py::handle out) const {
        const std::size_t all = total(count, n), products = static_cast<std::size_t>(count) * memory;
        const dr::ActiveImages active{count, team(threads), n, dr::indices(idx, count, batch, "idx")};
        const dr::AndersonHistory history = anderson_history(batch, n, memory, state);
        run([&, c = in(c, products, "c"), limit = dr::memory<double>(limit, count, "limit"), x = in(x, all, "x"),
             f = in(f, all, "f"), out = dr::memory<float>(out, all, "out")] {
            kernels_->combine(active, history, c, limit, x, f, out);
        });
    }

  private:
    static std::size_t total(int count, std::size_t n) {
        if (count < 0) throw std::invalid_argument("a number of images");
        return count * n;
    }
    static const float* in(py::handle t, std::size_t n, const char* name) { return dr::memory<float>(t, n, name); }
    static const std::uint8_t* flags(py::handle t, std::size_t n, const char* name) {
        return reinterpret_cast<const std::uint8_t*>(dr::memory<bool>(t, n, name));
    }
    static dr::AndersonHistory anderson_history(int batch, std::size_t n, int memory, const Tensors& state) {
        if (memory < 1 || state.size() != 4) throw std::invalid_argument("dx, df, x and f");
        const std::size_t all = total(batch, n);
        return {memory, dr::memory<float>(state[0], all * memory, "dx"), dr::memory<float>(state[1], all * memory, "df"),
                dr::memory<float>(state[2], all, "x of all"), dr::memory<float>(state[3], all, "f of all")};
    }

    const dr::VectorKernels* kernels_;
};

inline void bind_vectors(py::module_& m) {
    py::class_<Vectors>(m, "Vectors")
        .def(py::init<const std::string&>())
        .def("dot", &Vectors::dot)
        .def("add", &Vectors::add)
        .def("secant", &Vectors::secant)
        .def("remember", &Vectors::remember)
        .def("combine", &Vectors::combine);
}

}  // namespace dr::bindings
