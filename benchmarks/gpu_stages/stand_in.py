"""Stand-in for a CUDA driver and for torch's CUDA device, on a machine without a GPU.

`install()` makes the package's GPU backend accept CPU tensors and sends every launch through the real compilers, caches
and launcher stubs of Triton and NVRTC, down to a `libcuda.so.1` whose functions do nothing. Kernels therefore write
nothing, but everything that a GPU needs is compiled. `prebuild.py` fills the caches this way, and
`gpu_session.py --stand-in` rehearses a session.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ARCHITECTURE = "sm_90"
CAPABILITY = 90
SHARED_LIMIT = 227 * 1024
"""Maximum bytes of shared memory per block on an H100 or H200."""

_LIBCUDA = r"""
#include <stdint.h>
#include <string.h>
typedef int CUresult;
#define OK(name, ...) CUresult name(__VA_ARGS__) { return 0; }
OK(cuInit, unsigned f)
OK(cuCtxSetCurrent, void* c)
OK(cuCtxSetLimit, int l, size_t v)
OK(cuFuncSetAttribute, void* f, int a, int v)
OK(cuFuncSetCacheConfig, void* f, int c)
OK(cuTensorMapEncodeTiled, void* t)
OK(cuOccupancyMaxActiveClusters, int* n, void* f, void* c)
CUresult cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
CUresult cuCtxGetLimit(size_t* v, int l) { *v = 1 << 20; return 0; }
CUresult cuDeviceGet(int* d, int i) { *d = i; return 0; }
CUresult cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
CUresult cuDeviceGetAttribute(int* v, int a, int d) { *v = 227 * 1024; return 0; }
CUresult cuGetErrorString(CUresult e, const char** s) { *s = "stand-in"; return 0; }
CUresult cuModuleLoadData(void** m, const void* image) { *m = (void*)1; return 0; }
CUresult cuModuleGetFunction(void** f, void* m, const char* name) { *f = (void*)1; return 0; }
/* Attribute 0 is the most threads of a block, the others are registers and local memory. */
CUresult cuFuncGetAttribute(int* v, int a, void* f) { *v = a == 0 ? 1024 : 0; return 0; }
CUresult cuPointerGetAttribute(void* out, int a, uint64_t p) { memcpy(out, &p, 8); return 0; }
static unsigned long long launches;
CUresult cuLaunchKernelEx(const void* c, void* f, void** p, void** e) { launches++; return 0; }
unsigned long long stand_in_launches(void) { return launches; }
"""


def libcuda() -> Path:
    """The folder of the stand-in `libcuda.so.1`, which is compiled once per version of its source."""
    folder = Path(tempfile.gettempdir()) / f"deepreg-fast-stand-in-{os.getuid()}"
    library_folder = folder / hashlib.sha256(_LIBCUDA.encode()).hexdigest()[:16]
    library = library_folder / "libcuda.so.1"
    if not library.exists():
        library_folder.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise RuntimeError("The stand-in needs a C compiler, but there is none; install gcc.")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, out = Path(scratch) / "libcuda.c", Path(scratch) / "libcuda.so.1"
            source.write_text(_LIBCUDA)
            flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([compiler, *flags, str(source), "-o", str(out)], check=True)
            out.replace(library)
    return library_folder


class Driver:
    """Stand-in for Triton's driver. Modules and launches go through Triton's own C code."""

    def __init__(self) -> None:
        place = libcuda()
        os.environ["TRITON_LIBCUDA_PATH"] = str(place)
        # Launcher stubs are linked to libcuda.so.1; once it is loaded, the loader finds it by this name.
        self.library = ctypes.CDLL(str(place / "libcuda.so.1"))
        self.library.stand_in_launches.restype = ctypes.c_ulonglong
        from triton.backends.nvidia import driver

        _mirror_stubs(driver)
        self.utils: Any = driver.CudaUtils()
        self.launcher_cls = driver.CudaLauncher

    def launches(self) -> int:
        """Number of kernels launched so far."""
        return int(self.library.stand_in_launches())

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Does nothing, because there is only one device."""

    def get_current_stream(self, device: int = 0) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Compute capability of an H100 or H200."""
        return divmod(CAPABILITY, 10)

    def get_current_target(self) -> Any:
        """The target that kernels are compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        """The device of the tensors."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The mapping of Triton's driver."""
        from triton.backends.nvidia import driver

        return driver.ty_to_cpp(ty)


def _mirror_stubs(driver: Any) -> None:
    """Also save each launcher stub under the key of a machine without the command `file`: Triton's key contains
    `platform.architecture()`, which differs there."""
    from triton.runtime import build, cache

    original, machine = driver.compile_module_from_src, build.platform_key()
    other_keys = {",".join([*machine.split(",")[:2], "64bit", linkage]) for linkage in ("ELF", "")} - {machine}

    def compile_module(src: str, name: str, **options: Any) -> Any:
        module = original(src=src, name=name, **options)
        built = Path(module.__file__)
        for key in other_keys:
            manager = cache.get_cache_manager(hashlib.sha256((src + key).encode()).hexdigest())
            if manager.get_file(built.name) is None:
                manager.put(built.read_bytes(), built.name, binary=True)
        return module

    driver.compile_module_from_src = compile_module


class _CudaSources:
    """Compiles a source of csrc/cuda through the disk cache; launches nothing."""

    def __init__(self, name: str, options: Sequence[str]) -> None:
        from deepreg_fast.backend.gpu import nvrtc

        nvrtc.compiled(name, options, ARCHITECTURE)

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Any]) -> None:
        pass


_ZEROS = {"empty": torch.zeros, "empty_like": torch.zeros_like, "new_empty": torch.Tensor.new_zeros}


class Devices(TorchFunctionMode):
    """Replaces CUDA devices in torch's calls by the CPU, and uninitialized memory, which no kernel will write, by
    zeros: flags that are false end every loop after its first round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _device(v) for k, v in (kwargs or {}).items()}
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "is_cuda":
            return False
        return _ZEROS.get(name, func)(*(_device(a) for a in args), **kwargs)


def _device(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class _Event:
    """Stand-in for `torch.cuda.Event`, with constant times."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Stream:
    """Stand-in for `torch.cuda.Stream`."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Graph:
    """Stand-in for `torch.cuda.CUDAGraph`: captured code runs once, and replays do nothing."""

    def capture_begin(self, *_: Any, **__: Any) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...

    def pool(self) -> Any:
        return None


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    replacements: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": _ignore,
        "empty_cache": _ignore, "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "reset_peak_memory_stats": _ignore,
        "mem_get_info": lambda *_: (1 << 37, 1 << 37),
        "get_device_capability": lambda *_: divmod(CAPABILITY, 10), "get_device_name": lambda *_: "stand-in",
        "Event": _Event, "Stream": _Stream, "CUDAGraph": _Graph, "graph": _nothing, "stream": _nothing,
        "device": _nothing, "current_stream": _Stream, "graph_pool_handle": _ignore, "_sleep": _ignore,
        "is_current_stream_capturing": lambda: False, "set_sync_debug_mode": _ignore, "_lazy_init": _ignore,
    }  # fmt: skip
    for name, value in replacements.items():
        setattr(cuda, name, value)
    # Modules move their parameters outside torch's function modes.
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_: self
    to = module.to

    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        return to(self, *(_device(a) for a in args), **{k: _device(v) for k, v in kwargs.items()})

    module.to = moved


def _ignore(*_: Any, **__: Any) -> None:
    return None


def _patch_loops() -> None:
    """Capture rounds as on a GPU. A replay writes nothing, so the flag that continues a loop is cleared here."""
    from deepreg_fast.batched import graphs, loop
    from deepreg_fast.inverse import hypergradient
    from deepreg_fast.solvers import linear_system

    loop._AS_DEVICE.set(True)
    modules: list[Any] = [hypergradient, linear_system, import_module("deepreg_fast.solvers.pgd")]
    for module in modules:
        module.records = lambda t: True
    original = graphs.GraphedLoop.__call__

    def call(self: graphs.GraphedLoop) -> None:
        original(self)
        if self._loop is not None:
            self._loop.state[0, "running"].zero_()

    graphs.GraphedLoop.__call__ = call  # type: ignore[method-assign]


def install() -> Driver:
    """Replace Triton's driver, NVRTC's loader and torch's CUDA device by the stand-in, permanently."""
    from triton.runtime import driver as triton_driver

    from deepreg_fast.backend.gpu import backend as gpu
    from deepreg_fast.backend.gpu import fused_chain, nvrtc, srm

    # NVRTC loads the real libcuda at its first use, and crashes with the stand-in.
    nvrtc.compile_sources({"empty.cu": "__global__ void empty() {}"}, [], ARCHITECTURE)
    driver = Driver()
    _patch_torch()
    active: Any = triton_driver
    active.set_active(driver)

    def find(A: Any, like: torch.Tensor) -> Any:
        def build() -> Any:
            return srm.build(A, SHARED_LIMIT, lambda options: _CudaSources("srm.cu", options))

        return srm.kept(A, build)

    backend: Any = gpu.GpuBackend
    refusal: Callable[[Any], str] = lambda like: f"it takes float32 tensors, not {like.dtype}."  # noqa: E731
    backend.unavailable = lambda self: None
    backend.serves = lambda self, like: None if like.dtype == torch.float32 else refusal(like)
    loader: Any = nvrtc
    loader.shared_limit = lambda _: SHARED_LIMIT
    loader.CudaModule = loader.module = lambda name, options, device: _CudaSources(name, options)
    srm.find = find
    fused_chain.machine_of = lambda _: fused_chain.Machine(
        132, SHARED_LIMIT, lambda options: _CudaSources(fused_chain.SOURCE, options)
    )
    _patch_loops()
    Devices().__enter__()
    return driver
