"""The conv chain's fused product as NVRTC compiles it: warnings, registers, machine instructions."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deepreg_fast.backend.gpu import fused_chain, nvrtc

LIMIT = 232448  # of an H100's block
BOUNDS = {("hvp", True): 97, ("hvp", False): 71, ("gradient", True): 82, ("gradient", False): 70}


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """`benchmarks/fused_model.py`."""
    pytest.importorskip("cupy", reason="CuPy, which binds NVRTC, is not installed")
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    path = Path(__file__).parents[1] / "benchmarks/fused_model.py"
    spec = importlib.util.spec_from_file_location("fused_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("sm", "limit"),
    [(90, LIMIT), pytest.param(80, 166912, marks=pytest.mark.long), pytest.param(100, LIMIT, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sweep", fused_chain.SWEEPS)
def test_nvrtc_compiles_without_warnings_or_spills(
    model: ModuleType, sm: int, limit: int, norm: bool, sweep: str
) -> None:
    cubin, log, how = model.compile_sweep(sweep, norm, sm, limit)
    assert not log.strip(), log
    assert how.shared <= limit
    name = fused_chain.kernel_name(sweep, norm)
    usage = model.resources(cubin)
    assert set(usage) == {name, f"{name}_measure"}
    for registers, stack in usage.values():
        assert stack == 0, "registers spill"
        # A scheduler has 16384 registers for its quarter of the warps.
        assert -(-registers // 8) * 8 * -(-how.blocks // 4) * 32 <= 16384
    if sm == 90:
        counts = model.stages(model.disassembled(cubin)[name])
        assert sum(c["HMMA"] for c in counts.values()) == {"hvp": 468, "gradient": 414}[sweep], "products of a step"
        found = sum(model.per_pixel(counts).values())
        assert found < BOUNDS[sweep, norm], "instructions per pixel"
        assert 0.5 < model.predict(counts, 256, 180, model.Device(), 144)["predicted"] < 2.0


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_nvcc_compiles_with_warnings_as_errors(tmp_path: Path) -> None:
    for name, text in nvrtc.sources(fused_chain.SOURCE).items():
        (tmp_path / name).write_text(text)
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "-DCHAIN_NORM=1"]
    done = subprocess.run([*command, fused_chain.SOURCE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
