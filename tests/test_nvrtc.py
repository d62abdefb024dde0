"""CUDA sources: compiled once, kept on disk, and told about where they do not compile."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deepreg_fast import cuda
from deepreg_fast.backend.gpu import nvrtc
from deepreg_fast.errors import BackendUnavailable

pytest.importorskip("cupy", reason="CuPy, which binds NVRTC, is not installed")

SOURCE = {
    "good.cu": '#include "two.cuh"\nextern "C" __global__ void f(float* p) { p[0] = TWO; }\n',
    "two.cuh": '#pragma once\n#include "one.cuh"\n#define TWO (ONE + ONE)\n',
    "one.cuh": "#pragma once\n#define ONE 1.0f\n",
    "bad.cu": '#include "worse.cuh"\nextern "C" __global__ void f(float* p) { g(p); }\n',
    "worse.cuh": "__device__ void g(float* p) {\n    p[0] = missing;\n}\n",
}


@pytest.fixture(name="folder", autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up sources and an empty cache."""
    monkeypatch.setattr(cuda, "source", SOURCE.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "deepreg-fast" / "cuda"


@pytest.fixture(name="compilations")
def _compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which architectures were compiled for."""
    made: list[str] = []
    compile_sources = nvrtc.compile_sources

    def counted(texts: dict[str, str], options: tuple[str, ...], architecture: str) -> tuple[bytes, str]:
        made.append(architecture)
        return compile_sources(texts, options, architecture)

    monkeypatch.setattr(nvrtc, "compile_sources", counted)
    return made


def test_headers_are_found_by_name():
    assert list(nvrtc.sources("good.cu")) == ["good.cu", "two.cuh", "one.cuh"]


def test_compiled_once(folder: Path, compilations: list[str]):
    cubin = nvrtc.compiled("good.cu", (), "sm_90")
    assert cubin.startswith(b"\x7fELF")
    assert nvrtc.compiled("good.cu", (), "sm_90") == cubin
    assert compilations == ["sm_90"]
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == hashlib.sha256(cubin).digest() + cubin


def test_everything_that_matters_is_in_the_key(compilations: list[str], monkeypatch: pytest.MonkeyPatch):
    nvrtc.compiled("good.cu", (), "sm_90")
    nvrtc.compiled("good.cu", (), "sm_80")
    nvrtc.compiled("good.cu", ("-DX=1",), "sm_90")
    monkeypatch.setitem(SOURCE, "one.cuh", "#pragma once\n#define ONE 2.0f\n")
    nvrtc.compiled("good.cu", (), "sm_90")
    monkeypatch.setattr(nvrtc, "_version", lambda _: "99.0")
    nvrtc.compiled("good.cu", (), "sm_90")
    assert compilations == ["sm_90", "sm_80", "sm_90", "sm_90", "sm_90"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"\x01"])
def test_a_damaged_file_is_compiled_again(damage, folder: Path, compilations: list[str]):
    cubin = nvrtc.compiled("good.cu", (), "sm_90")
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert nvrtc.compiled("good.cu", (), "sm_90") == cubin
    assert kept.read_bytes() == whole
    assert len(compilations) == 2


def test_without_a_place_to_write(folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch):
    # A file where the folder should be: root may write anywhere, so that permissions would prove nothing.
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("in the way")
    first, second = (nvrtc.compiled("good.cu", (), "sm_90") for _ in range(2))
    assert first == second and len(compilations) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert nvrtc.compiled("good.cu", (), "sm_90") == first


def test_an_error_quotes_the_line(folder: Path):
    with pytest.raises(BackendUnavailable) as told:
        nvrtc.compiled("bad.cu", (), "sm_90")
    message = str(told.value)
    assert "must compile bad.cu for sm_90" in message
    assert "\nworse.cuh, line 2: p[0] = missing;\n" in message
    assert 'identifier "missing" is undefined' in message
    assert "'reference'" in message
    assert not folder.exists() or not os.listdir(folder)


def test_an_unknown_architecture():
    with pytest.raises(BackendUnavailable, match=r"(?s)must compile good\.cu for sm_1.*architecture"):
        nvrtc.compiled("good.cu", (), "sm_1")
