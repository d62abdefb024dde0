"""Build settings that pyproject.toml cannot express: `kernels/` is installed as `deepreg_fast.kernels`, the CUDA
sources of `csrc/cuda` as data of `deepreg_fast.cuda`, and the C++ extension is built from `csrc/cpu`.

The sources are compiled for several instruction sets with separate flags, and the extension selects one at run time. If
it cannot be built (no compiler), the package installs without it and runs on the reference backend.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# gcc 12 warns about uninitialized variables because of undefined registers in its own AVX-512 headers.
COMMON = [
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-g0",
]
# All other sources use -O3. Optimizing the bindings' templates would take longer than they ever run, and the hot loops
# of ridge are unrolled by hand.
OPTIMIZED = {"module": ["-O1"], "ridge": ["-O2"]}
# torch's Linux wheels include libgomp; Apple's clang has no OpenMP.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# "address,undefined" for `make sanitize`.
SANITIZE = os.environ.get("DEEPREG_FAST_SANITIZE", "")
CHECKED = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g1"] if SANITIZE else []
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}


class BuildPerInstructionSet(build_ext):
    """Compiles each source with its own flags, in parallel on all processors."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, then link."""
        if self.compiler.compiler_type == "msvc":
            self.warn("MSVC lacks the vector extensions that csrc/cpu is written in: the backend 'cpu' is left out.")
            return

        def compiled(source: str) -> list[str]:
            stem = source.rpartition("/")[2].removesuffix(".cpp")
            name, _, kind = stem.rpartition("_")
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[
                    *COMMON,
                    *OPTIMIZED.get(name or kind, ["-O3"]),
                    *OPENMP,
                    *FLAGS.get(kind, []),
                    *CHECKED,
                ],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            jobs = [threads.submit(compiled, source) for source in ext.sources]
            try:
                objects = [name for job in jobs for name in job.result()]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=[*OPENMP, *CHECKED[:1]], target_lang="c++"
        )


def extensions() -> list[Extension]:
    """The extension, if pybind11 is installed (the build system requires it)."""
    try:
        import pybind11
    except ImportError:
        return []
    names = ("conv_chain", "ridge", "srm", "tomography", "tv", "vectors")
    # The slowest to compile come first, so that no processor is idle at the end.
    kinds = ["portable", *(["avx2", "avx512"] if X86 else [])]
    return [
        Extension(
            "deepreg_fast._cpu",
            [
                *(f"csrc/cpu/{names[0]}_{k}.cpp" for k in kinds),
                "csrc/cpu/module.cpp",
                *(f"csrc/cpu/{name}_{k}.cpp" for name in names[1:] for k in kinds),
            ],
            include_dirs=[pybind11.get_include(), "csrc/cpu"],
            depends=sorted(str(p) for p in Path("csrc/cpu").glob("*") if p.suffix in (".h", ".inc")),
            optional=True,
        )
    ]


setup(
    packages=[
        *find_packages(include=["deepreg_fast", "deepreg_fast.*"]),
        "deepreg_fast.kernels",
        *(f"deepreg_fast.kernels.{name}" for name in find_packages("kernels")),
        "deepreg_fast.cuda",
    ],
    package_dir={"deepreg_fast.kernels": "kernels", "deepreg_fast.cuda": "csrc/cuda"},
    package_data={
        "deepreg_fast": ["py.typed", "_cpu.pyi"],
        "deepreg_fast.data": ["*.json"],
        "deepreg_fast.weights": ["*.safetensors"],
        "deepreg_fast.experiments": ["*.toml"],
        "deepreg_fast.cuda": ["*.cu", "*.cuh"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildPerInstructionSet},
)
