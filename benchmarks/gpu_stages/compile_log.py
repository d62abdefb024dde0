"""Log of a process's compilations: Triton's kernels, its launcher stubs, NVRTC's sources."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CompileLog:
    """The compilations since `start`, and the number of cache hits."""

    hits: int = 0
    misses: dict[str, float] = field(default_factory=dict)
    """Seconds of each compilation, by name."""

    def record(self, name: str, seconds: float) -> None:
        """Record a compilation."""
        key, n = name, 1
        while key in self.misses:
            n += 1
            key = f"{name} #{n}"
        self.misses[key] = round(seconds, 3)

    def take(self) -> dict[str, Any]:
        """Return the record and clear it for the next stage."""
        taken = {"cached": self.hits, "compiled": dict(self.misses), "seconds": round(sum(self.misses.values()), 2)}
        self.hits, self.misses = 0, {}
        return taken

    def start(self) -> CompileLog:
        """Hook into this process's compilers."""
        if importlib.util.find_spec("triton") is not None:
            self._listen_to_triton()
        self._listen_to_nvrtc()
        return self

    def _listen_to_triton(self) -> None:
        from triton import knobs
        from triton.runtime import build

        def compiled(*, src: Any, metadata: Any, times: Any, cache_hit: bool, **_: Any) -> None:
            if cache_hit:
                self.hits += 1
                return
            stages = sum(micros for _, micros in times.lowering_stages)
            self.record(f"triton {metadata['name']}", 1e-6 * (times.ir_initialization + stages + times.store_results))

        knobs.compilation.listener = compiled
        build._build = self._timed(build._build, lambda name, *_: f"stub {name}")

    def _listen_to_nvrtc(self) -> None:
        from deepreg_fast.backend.gpu import nvrtc

        module: Any = nvrtc
        module.compile_sources = self._timed(
            module.compile_sources, lambda texts, options, *_: f"nvrtc {next(iter(texts))} {' '.join(options)}"
        )

    def _timed(self, f: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                self.record(name(*args), time.perf_counter() - began)

        return call
