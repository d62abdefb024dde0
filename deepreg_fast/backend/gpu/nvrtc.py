"""CUDA C++ sources: compiled by NVRTC at their first use, cached on disk, loaded and launched through CuPy.

Compilation needs no GPU; `CudaModule` does. CuPy is imported inside functions, so the package imports without it.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import cuda
from ...errors import BackendUnavailable, InputError
from ...files import write_atomically

_OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_ERROR = re.compile(r"^([\w.]+)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)


def sources(name: str) -> dict[str, str]:
    """The texts of a source in `csrc/cuda` and of every header that it includes, by name; the source comes first."""
    texts: dict[str, str] = {}
    pending = [name]
    while pending:
        file = pending.pop()
        if file not in texts:
            texts[file] = cuda.source(file)
            pending += _INCLUDE.findall(texts[file])
    return texts


def compile_sources(texts: dict[str, str], options: Sequence[str], architecture: str) -> tuple[bytes, str]:
    """Compile the first of `texts` (the others are its headers) for e.g. `"sm_90"`; return the cubin and NVRTC's log.

    Raises
    ------
    BackendUnavailable
        If NVRTC is not installed, or compilation fails; the message contains the log and the first faulty line.
    """
    nvrtc = _nvrtc()
    (name, text), *headers = texts.items()
    program = nvrtc.createProgram(text, name, [t.encode() for _, t in headers], [n.encode() for n, _ in headers])
    try:
        nvrtc.compileProgram(program, [*_OPTIONS, f"--gpu-architecture={architecture}", *options])
        # CuPy cuts off the last byte as a string terminator, but tools that read the whole ELF file need that zero.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise BackendUnavailable(
            f"NVRTC {_version(nvrtc)} must compile {name} for {architecture}, but says {error}:{_quoted(texts, log)}\n"
            f"{log.strip()}\nInstall the NVRTC of 'deepreg-fast[gpu]', or use the backend 'reference'."
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def compiled(name: str, options: Sequence[str], architecture: str) -> bytes:
    """The cubin of a source in `csrc/cuda`, from the user's cache if it is there and intact.

    The cache is `$XDG_CACHE_HOME/deepreg-fast/cuda` (`~/.cache` by default). A file holds the SHA-256 of its contents
    and the contents; its name contains the SHA-256 of everything that the contents depend on. Without a writable
    folder, every process compiles.
    """
    texts = sources(name)
    parts = [*(t for pair in texts.items() for t in pair), *_OPTIONS, *options, architecture, _version(_nvrtc())]
    key = hashlib.sha256("\0".join(f"{len(p)}\0{p}" for p in parts).encode()).hexdigest()
    try:
        path = _folder() / f"{Path(name).stem}-{key}.cubin"
        cached = path.read_bytes()
        if hashlib.sha256(cached[32:]).digest() == cached[:32]:
            return cached[32:]
    except (OSError, RuntimeError):  # not there yet; RuntimeError: no home folder
        pass
    cubin, _ = compile_sources(texts, options, architecture)
    try:
        path = _folder() / f"{Path(name).stem}-{key}.cubin"
        write_atomically(path, hashlib.sha256(cubin).digest() + cubin)
    except (InputError, OSError, RuntimeError):
        pass
    return cubin


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "deepreg-fast" / "cuda"


def _cupy() -> Any:
    """The module `cupy.cuda`."""
    import cupy.cuda

    return cupy.cuda


def _nvrtc() -> Any:
    try:
        nvrtc = _cupy().nvrtc
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"CuPy and NVRTC must be here to compile CUDA sources, but: {error}; pip install 'deepreg-fast[gpu]', "
            "or use the backend 'reference'."
        ) from error
    return nvrtc


def _version(nvrtc: Any) -> str:
    return ".".join(map(str, nvrtc.getVersion()))


def _quoted(texts: dict[str, str], log: str) -> str:
    """The source line of the log's first error."""
    place = _ERROR.search(log)
    lines = texts.get(place[1], "").splitlines() if place else []
    if place is None or not 0 < int(place[2]) <= len(lines):
        return ""
    return f"\n{place[1]}, line {place[2]}: {lines[int(place[2]) - 1].strip()}"


def shared_limit(device: torch.device) -> int:
    """Maximum bytes of shared memory per block of this GPU."""
    runtime = _cupy().runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, _index(device)))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class CudaModule:
    """A compiled source on one GPU.

    The first launch of a kernel loads it, which cannot be captured in a CUDA graph, so launch once before capturing.
    """

    def __init__(self, name: str, options: Sequence[str], device: torch.device) -> None:
        self._device = torch.device("cuda", _index(device))
        major, minor = torch.cuda.get_device_capability(self._device)
        cubin = compiled(name, options, f"sm_{major}{minor}")
        self._lock = threading.Lock()
        self._functions: dict[tuple[str, int], Any] = {}
        with torch.cuda.device(self._device):
            self._module = _cupy().function.Module()
            self._module.load(cubin)

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        """Launch `blocks` blocks of `threads` threads, `shared` bytes per block, on torch's current stream."""
        with torch.cuda.device(self._device):
            function = self._function(kernel, shared)
            function((blocks,), (threads,), tuple(arguments), shared_mem=shared, stream=self._stream())

    def _function(self, kernel: str, shared: int) -> Any:
        driver = _cupy().driver
        with self._lock:
            function = self._functions.get((kernel, shared))
            if function is None:
                function = self._module.get_function(kernel)
                max_shared = max([shared, *(s for k, s in self._functions if k == kernel)])
                driver.funcSetAttribute(
                    function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, max_shared
                )
                self._functions[kernel, shared] = function
            return function

    def _stream(self) -> Any:
        stream = torch.cuda.current_stream(self._device)
        if hasattr(stream, "__cuda_stream__"):
            return _cupy().Stream.from_external(stream)
        return _cupy().ExternalStream(stream.cuda_stream, self._device.index)


_MODULES: dict[tuple[str, tuple[str, ...], int], CudaModule] = {}
_LOADING = threading.Lock()


def module(name: str, options: Sequence[str], device: torch.device) -> CudaModule:
    """The module of a source, cached per options and GPU in this process."""
    key = (name, tuple(options), _index(device))
    with _LOADING:
        if key not in _MODULES:
            _MODULES[key] = CudaModule(name, options, device)
        return _MODULES[key]
