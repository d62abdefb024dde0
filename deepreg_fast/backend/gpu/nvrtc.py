"""CUDA C++ sources compiled at their first use by NVRTC, kept on disk, loaded and launched through CuPy.

Compiling needs no GPU; `CudaModule` does. CuPy is imported inside functions: `import deepreg_fast` stays without it.
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
    """The text of a source of `csrc/cuda` and of every header that it includes, by name, the source first."""
    found: dict[str, str] = {}
    wanted = [name]
    while wanted:
        one = wanted.pop()
        if one not in found:
            found[one] = cuda.source(one)
            wanted += _INCLUDE.findall(found[one])
    return found


def compile_sources(texts: dict[str, str], options: Sequence[str], architecture: str) -> tuple[bytes, str]:
    """The cubin of the first of `texts`, the others being its headers, for `"sm_90"` or the like; NVRTC's log.

    Raises
    ------
    BackendUnavailable
        If NVRTC is not here or does not compile it, with its log and the first line that it complains about.
    """
    nvrtc = _nvrtc()
    (name, text), *headers = texts.items()
    program = nvrtc.createProgram(text, name, [t.encode() for _, t in headers], [n.encode() for n, _ in headers])
    try:
        nvrtc.compileProgram(program, [*_OPTIONS, f"--gpu-architecture={architecture}", *options])
        # CuPy cuts off the last byte as if it ended a string; tools that read the ELF file whole miss that zero.
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
    """The cubin of a source of `csrc/cuda`, from the user's cache where it is there and whole.

    The cache is `$XDG_CACHE_HOME/deepreg-fast/cuda` (`~/.cache` by default). A file is the SHA-256 of its contents,
    then the contents; its name is the SHA-256 of all that the contents depend on. Without a folder to write to,
    every process compiles.
    """
    texts = sources(name)
    parts = [*(t for pair in texts.items() for t in pair), *_OPTIONS, *options, architecture, _version(_nvrtc())]
    key = hashlib.sha256("\0".join(f"{len(p)}\0{p}" for p in parts).encode()).hexdigest()
    try:
        path = _folder() / f"{Path(name).stem}-{key}.cubin"
        kept = path.read_bytes()
        if hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept[32:]
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
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "deepreg-fast" / "cuda"


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
    """The first line that the log complains about."""
    place = _ERROR.search(log)
    lines = texts.get(place[1], "").splitlines() if place else []
    if place is None or not 0 < int(place[2]) <= len(lines):
        return ""
    return f"\n{place[1]}, line {place[2]}: {lines[int(place[2]) - 1].strip()}"


def shared_limit(device: torch.device) -> int:
    """The bytes of shared memory that a block of this GPU can have."""
    runtime = _cupy().runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, _index(device)))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class CudaModule:
    """A compiled source on one GPU.

    The first launch of a kernel loads it, which a CUDA graph cannot capture: launch once before capturing.
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
        """Start `blocks` blocks of `threads` threads with `shared` bytes each on torch's current stream."""
        with torch.cuda.device(self._device):
            function = self._function(kernel, shared)
            function((blocks,), (threads,), tuple(arguments), shared_mem=shared, stream=self._stream())

    def _function(self, kernel: str, shared: int) -> Any:
        driver = _cupy().driver
        with self._lock:
            found = self._functions.get((kernel, shared))
            if found is None:
                found = self._module.get_function(kernel)
                most = max([shared, *(s for k, s in self._functions if k == kernel)])
                driver.funcSetAttribute(found.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
                self._functions[kernel, shared] = found
            return found

    def _stream(self) -> Any:
        stream = torch.cuda.current_stream(self._device)
        if hasattr(stream, "__cuda_stream__"):
            return _cupy().Stream.from_external(stream)
        return _cupy().ExternalStream(stream.cuda_stream, self._device.index)


_MODULES: dict[tuple[str, tuple[str, ...], int], CudaModule] = {}
_LOADING = threading.Lock()


def module(name: str, options: Sequence[str], device: torch.device) -> CudaModule:
    """The module of a source, one per options and GPU in this process."""
    key = (name, tuple(options), _index(device))
    with _LOADING:
        if key not in _MODULES:
            _MODULES[key] = CudaModule(name, options, device)
        return _MODULES[key]
