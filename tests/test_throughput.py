"""Recovery of many images: every source, one line per image whatever is killed, and the bits of one image alone."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.data import load_image, save_image
from deepreg_fast.errors import InputError
from deepreg_fast.inverse.measurements import save_measurements
from deepreg_fast.problem import Problem
from deepreg_fast.throughput import (
    Job,
    Source,
    Units,
    loop,
    open_source,
    results,
    run,
    shard_of_environment,
    summary,
)
from deepreg_fast.throughput.results import read_lines
from deepreg_fast.throughput.units import parse_shard

from .helpers import images, random_red
from .test_cli import Run, _run

SHAPE, COUNT, MU = (1, 14, 12), 7, 0.05
PROBLEM = Problem("cs", ratio=0.5)
OPTIONS = dr.PGDOptions(30, 1e-4, "fista")
__all__ = ["_run"]


def pictures() -> torch.Tensor:
    """Images whose values 8 bits hold exactly."""
    return (images(COUNT, *SHAPE, dtype=torch.float32) * 255).round() / 255


def operator() -> dr.SRM:
    return dr.SRM(SHAPE, 0.5)


def job(source: Source, **changes: Any) -> Job:
    reg = random_red(scale=0.06, double=False, channels=4)
    return Job(source, reg, lambda sigma: MU, OPTIONS, {}, **{"unit": 3, "slots": 3, **changes})


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def npy(t: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, t.numpy())
    return buffer.getvalue()


def folder_of_pictures(tmp: Path) -> str:
    for i, x in enumerate(pictures()):
        save_image(tmp / f"a{i}.png", x)
    return str(tmp)


def tar_of_pictures(tmp: Path) -> str:
    folder_of_pictures(tmp)
    for shard in range(2):
        with tarfile.open(tmp / f"shard-{shard:03d}.tar", "w") as archive:
            for i in range(shard * 4, min(COUNT, shard * 4 + 4)):
                add(archive, f"a{i}.json", b"{}")
                add(archive, f"a{i}.png", (tmp / f"a{i}.png").read_bytes())
    return str(tmp / "shard-{000..001}.tar")


def tar_of_arrays(tmp: Path) -> str:
    """Both shards number their images from zero."""
    x = pictures()
    y = operator().A(x)
    for shard in range(2):
        with tarfile.open(tmp / f"s{shard}.tar", "w") as archive:
            for i in range(shard * 4, min(COUNT, shard * 4 + 4)):
                add(archive, f"./{i % 4:04d}.y.npy", npy(y[i]))
                add(archive, f"./{i % 4:04d}.x.npy", npy(x[i]))
    return str(tmp)


def hdf5(tmp: Path) -> str:
    """As deepinv's generate_dataset writes it: train and test."""
    h5py = pytest.importorskip("h5py")
    x = pictures()
    with h5py.File(tmp / "dinv_dataset0.h5", "w") as f:
        f.attrs["operator"] = "CompressedSensing"
        for name, part in (("test", x[4:]), ("train", x[:4])):
            f.create_dataset(f"y_{name}", data=operator().A(part).numpy())
            f.create_dataset(f"x_{name}", data=part.numpy())
    return str(tmp / "dinv_dataset0.h5")


def zarr_group(tmp: Path) -> str:
    zarr = pytest.importorskip("zarr")
    x = pictures()
    group = zarr.open_group(str(tmp / "d.zarr"), mode="w")
    for name, t in (("y", operator().A(x)), ("x", x)):
        array = group.create_array(name, shape=t.shape, dtype="float32", chunks=(3, *t.shape[1:]))
        array[:] = t.numpy()
    return str(tmp / "d.zarr")


def measurement_files(tmp: Path) -> str:
    y = operator().A(pictures())
    for name, part in (("a.npz", y[:2]), ("b.safetensors", y[2:6]), ("c.npz", y[6:])):
        save_measurements(tmp / name, part, operator(), 0.0)
    return str(tmp)


# How each is made, its first key, and the order of the images: HDF5's splits are sorted.
KINDS: dict[str, tuple[Callable[[Path], str], str, list[int]]] = {
    "pictures": (folder_of_pictures, "a0", list(range(COUNT))),
    "tar of pictures": (tar_of_pictures, "a0", list(range(COUNT))),
    "tar of arrays": (tar_of_arrays, "s0___0000", list(range(COUNT))),
    "hdf5": (hdf5, "test_0000000", [4, 5, 6, 0, 1, 2, 3]),
    "zarr": (zarr_group, "image_0000000", list(range(COUNT))),
    "measurement files": (measurement_files, "a_000", list(range(COUNT))),
}


def recovered(out: Path) -> dict[str, torch.Tensor]:
    """The images of all units by key."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted((out / "units").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None and member.name.endswith(".npy")
                found[member.name[:-4]] = torch.from_numpy(np.load(io.BytesIO(file.read())))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_recoveries_of_each_image_alone(kind: str, tmp_path: Path) -> None:
    make, first, order = KINDS[kind]
    (tmp_path / "data").mkdir()
    source = open_source(make(tmp_path / "data"), PROBLEM)
    assert len(source) == COUNT and source.key(0) == first
    assert run(job(source), tmp_path / "out") == COUNT
    lines = list(read_lines(tmp_path / "out"))
    assert [line["key"] for line in lines] == [source.key(i) for i in range(COUNT)]
    x, found = pictures(), recovered(tmp_path / "out")
    reg = random_red(scale=0.06, double=False, channels=4)
    for line, i in zip(lines, order, strict=True):
        alone = dr.recover(operator().A(x[i : i + 1]), operator(), reg, MU, options=OPTIONS)
        assert torch.equal(found[line["key"]], alone.x[0])
        assert line["iterations"] == int(alone.iterations) and line["residual"] == float(alone.residual)
        assert line["status"] == dr.Status(int(alone.status)).name.lower()
        if kind != "measurement files":
            assert line["psnr"] == float(dr.psnr(alone.x, x[i : i + 1]))
    assert run(job(source), tmp_path / "out") == 0, "a run that is done has nothing to do"


def test_one_bad_file_is_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    folder_of_pictures(data)
    (data / "a1.png").write_bytes(b"no picture")
    save_image(data / "a2.png", torch.zeros(1, 5, 5))
    run(job(open_source(str(data), PROBLEM)), tmp_path / "out")
    lines = {line["key"]: line for line in read_lines(tmp_path / "out")}
    assert [k for k, line in lines.items() if line["status"] == "error"] == ["a1", "a2"] and len(lines) == COUNT
    assert "a1.png" in lines["a1"]["error"] and "[1, 5, 5]" in lines["a2"]["error"]
    found = summary(tmp_path / "out")
    assert found["statuses"]["error"] == 2 and len(found["errors"]) == 2 and found["done"] == COUNT
    assert sorted(recovered(tmp_path / "out")) == ["a0", "a3", "a4", "a5", "a6"]


def test_damaged_shards_and_measurement_files_are_lines(tmp_path: Path) -> None:
    for name in ("tar", "arrays", "files"):
        (tmp_path / name).mkdir()
    tar_of_pictures(tmp_path / "tar")
    second = tmp_path / "tar" / "shard-001.tar"
    second.write_bytes(second.read_bytes()[:1300])
    source = open_source(str(tmp_path / "tar" / "shard-*.tar"), PROBLEM)
    run(job(source), tmp_path / "out")
    bad = [line for line in read_lines(tmp_path / "out") if line["status"] == "error"]
    assert len(source) - len(bad) == 4 and "shard-001" in bad[-1]["error"]

    measurement_files(tmp_path / "files")
    (tmp_path / "files" / "b.safetensors").write_bytes(b"short")
    other = dr.SRM(SHAPE, 0.5, seed=1)
    save_measurements(tmp_path / "files" / "d.npz", other.A(pictures()[:1]), other, 0.0)
    y = operator().A(pictures()[:2])
    y[0, 0] = float("nan")
    save_measurements(tmp_path / "files" / "e.npz", y, operator(), 0.0)
    run(job(open_source(str(tmp_path / "files"), PROBLEM)), tmp_path / "out2")
    lines = {line["key"]: line for line in read_lines(tmp_path / "out2")}
    assert "whole measurement file" in lines["b"]["error"] and "fingerprint" in lines["d"]["error"]
    assert lines["e_000"]["status"] == "non_finite" and lines["e_000"]["residual"] is None
    assert {lines[k]["status"] for k in ("a_000", "a_001", "c", "e_001")} <= {"converged", "max_iterations"}


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path | str, match: str, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            open_source(str(path), PROBLEM, **options)

    refused(tmp_path / "nothing", "nothing at")
    refused(tmp_path / "x*.tar", "nothing at")
    refused(tmp_path, "none of these")
    folder_of_pictures(tmp_path)
    (tmp_path / "a.txt").touch()
    refused(tmp_path / "a.txt", "name one of these")
    save_measurements(tmp_path / "m.npz", operator().A(pictures()), operator(), 0.0)
    refused(tmp_path, "measurement files and pictures")
    (tmp_path / "m.npz").unlink()
    save_image(tmp_path / "a0.bmp", pictures()[0])
    refused(tmp_path, "a0 comes twice")
    masks = dr.Inpainting(torch.ones(COUNT, *SHAPE, dtype=torch.bool))
    save_measurements(tmp_path / "masks.npz", masks.A(pictures()), masks, 0.0)
    refused(tmp_path / "masks.npz", "parameters for 7 images")
    for name, file in (("h5py", "a.h5"), ("zarr", "a.zarr")):
        path = tmp_path / file
        path.mkdir() if name == "zarr" else path.touch()
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            refused(path, f"pip install {name}")
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "b.h5", "w") as f:
        f["y_train"], f["mask_train"] = np.zeros((3, *SHAPE), np.float32), np.zeros((3, *SHAPE))
    refused(tmp_path / "b.h5", "mask_train")
    refused(tmp_path / "b.h5", "y_test", split="test")
    with h5py.File(tmp_path / "c.h5", "w") as f:
        f["y_train"], f["x_train"] = dr.SRM(SHAPE, 0.5, seed=1).A(pictures()).numpy(), pictures().numpy()
    refused(tmp_path / "c.h5", "far from what it measures")
    with h5py.File(tmp_path / "d.h5", "w") as f:
        f["y"], f["x"] = dr.SRM(SHAPE, 0.3).A(pictures()).numpy(), pictures().numpy()
    refused(tmp_path / "d.h5", "name the problem")
    with h5py.File(tmp_path / "e.h5", "w") as f:
        f["y"] = operator().A(pictures()).numpy()
    refused(tmp_path / "e.h5", "save_measurements")


def test_units_are_claimed_once(tmp_path: Path) -> None:
    a, b = Units(tmp_path, 10, 4), Units(tmp_path, 10, 4, (1, 3))
    first, second = a.claim(), b.claim()
    assert first and second and (first.index, second.index) == (0, 1) and list(second.images) == [4, 5, 6, 7]
    third = b.claim()
    assert third and third.index == 2 and list(third.images) == [8, 9]
    assert a.claim() is None and b.claim() is None and not a.all_done()
    first.release(False)
    again = b.claim()
    assert again and again.index == 0
    for claim in (again, second, third):
        claim.lines_path.write_text("")
        claim.release(True)
    assert a.claim() is None and a.all_done() and a.finished() == 3
    assert list((tmp_path / "locks").iterdir()) == []


class Child:
    """A process that runs `work(child)`. It ends when it is killed, or with this process."""

    def __init__(self, work: Callable[[Child], None]) -> None:
        (self._reading, self._report), (self._gate, self._open) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._open)
                torch.set_num_threads(1)
                work(self)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(self._report)
        os.close(self._gate)

    def report(self, number: int) -> None:
        """In the child: send a number."""
        os.write(self._report, bytes([number]))

    def wait(self) -> None:
        """In the child: tell that it has come here, and wait for the end."""
        self.report(0)
        os.read(self._gate, 1)
        os._exit(1)

    def reported(self) -> int:
        """In the parent: the next number, when it comes."""
        (number,) = os.read(self._reading, 1)
        return number

    def end(self, kill: bool = True) -> int:
        """In the parent: kill the child, or wait for it; its exit status."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self._reading)
        os.close(self._open)
        return status


def stop_at(monkeypatch: pytest.MonkeyPatch, gate: str, child: Child) -> None:
    """The process waits for its end: in a round, or before a file of a unit is renamed."""
    if gate == "round":
        advance, rounds = loop.Solver.advance, iter(range(1000))
        monkeypatch.setattr(
            loop.Solver, "advance", lambda solver: child.wait() if next(rounds) == 7 else advance(solver)
        )
        return
    write = results.write_atomically

    def gated(path: Path, data: Any) -> None:
        if path.suffix == gate and path.stem == "000001":
            # What a writer that is killed leaves behind.
            path.with_name(f".{path.name}.1-0.tmp").write_bytes(b"part")
            child.wait()
        write(path, data)

    monkeypatch.setattr(results, "write_atomically", gated)


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "units").iterdir()}


def test_killed_processes_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in a round, before the images and before the lines of a unit: the results have the bytes of one run."""
    (tmp_path / "data").mkdir()
    source = open_source(folder_of_pictures(tmp_path / "data"), PROBLEM)
    run(job(source), tmp_path / "whole")
    for gate in ("round", ".tar", ".jsonl"):

        def work(child: Child, gate: str = gate) -> None:
            stop_at(monkeypatch, gate, child)
            run(job(source, slots=2), tmp_path / "out")

        child = Child(work)
        assert child.reported() == 0
        assert os.WIFSIGNALED(child.end())
    before = {p.name for p in (tmp_path / "out" / "units").iterdir()}
    assert "000001.tar" in before and "000001.jsonl" not in before
    run(job(source, slots=4, workers=1), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_processes_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = open_source(folder_of_pictures(tmp_path / "data"), PROBLEM)
    run(job(source, unit=1), tmp_path / "whole")

    def work(child: Child, i: int) -> None:
        child.report(run(job(source, unit=1), tmp_path / "out", (i, 3)))

    children = [Child(lambda child, i=i: work(child, i)) for i in range(3)]
    counts = [child.reported() for child in children]
    assert [child.end(kill=False) for child in children] == [0, 0, 0]
    assert sum(counts) == COUNT, "no image is recovered twice"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_process_that_waits_takes_over_from_one_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    source = open_source(folder_of_pictures(tmp_path / "data"), PROBLEM)

    def hold(child: Child) -> None:
        claim = Units(tmp_path / "out", COUNT, 3, (1, 3)).claim()
        assert claim and claim.index == 1
        child.wait()

    child = Child(hold)
    assert child.reported() == 0
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            assert sorted(p.name for p in (tmp_path / "out/units").glob("*.jsonl")) == ["000000.jsonl", "000002.jsonl"]
            child.end()

    monkeypatch.setattr(loop.time, "sleep", sleep)
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.0)
    assert run(job(source), tmp_path / "out") == COUNT and waits
    assert len(list(read_lines(tmp_path / "out"))) == COUNT


def test_where_a_process_begins() -> None:
    assert parse_shard("2/5") == (2, 5)
    for text in ("5/5", "1", "a/2", "-1/2", "1/"):
        with pytest.raises(InputError, match="i/n"):
            parse_shard(text)
    assert shard_of_environment({}) == (0, 1)
    assert shard_of_environment({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}) == (1, 2)
    array = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "2"}
    assert shard_of_environment({**array, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == (2, 3)


def test_on_the_command_line(run: Run, tmp_path: Path) -> None:
    dr.save(random_red(scale=0.03, double=False, channels=4), tmp_path / "w.safetensors", {"mu": MU})
    (tmp_path / "data").mkdir()
    folder_of_pictures(tmp_path / "data")
    command = ("recover", "--data", tmp_path / "data", "--weights", tmp_path / "w.safetensors", "--ratio", 0.5)
    command = (*command, "--sigma", 0.01, "--unit", 3, "--slots", 4, "--images", "both", "--out", tmp_path / "out")
    answer = run(*command)
    assert answer.code == 0 and "7 of 7 done" in answer.out and "dB" in answer.out
    with tarfile.open(tmp_path / "out/units/000000.tar") as archive:
        assert archive.getnames() == ["a0.npy", "a0.png", "a1.npy", "a1.png", "a2.npy", "a2.png"]
    # The first image has the noise of the command for one image.
    alone = ("recover", tmp_path / "data/a0.png", "--weights", tmp_path / "w.safetensors", "--ratio", 0.5)
    assert run(*alone, "--sigma", 0.01, "--out", tmp_path / "alone").code == 0
    with tarfile.open(tmp_path / "out/units/000000.tar") as archive:
        file = archive.extractfile("a0.npy")
        assert file is not None
        assert np.array_equal(np.load(io.BytesIO(file.read())), np.load(tmp_path / "alone/a0.npy"))
    assert json.loads(run("summary", tmp_path / "out", "--json").out)["done"] == COUNT
    assert "7 of 7 done" in run("summary", tmp_path / "out").out
    other = run(*command, "--tolerance", 0.1)
    assert other.code == 2 and "options" in other.err
    assert run(*command, "--shard", "3").code == 2
    assert run("summary", tmp_path).code == 2
    both = run(*command[:1], tmp_path / "data/a0.png", *command[1:])
    assert both.code == 2 and "SOURCE or --data" in both.err
    assert run("recover", "--weights", tmp_path / "w.safetensors").code == 2


def test_pictures_that_are_measurements(run: Run, tmp_path: Path) -> None:
    dr.save(random_red(scale=0.03, double=False, channels=4), tmp_path / "w.safetensors", {"mu": MU})
    (tmp_path / "data").mkdir()
    folder_of_pictures(tmp_path / "data")
    save_image(tmp_path / "kernel.png", torch.ones(1, 3, 3))
    command = ("--measured", "--problem", tmp_path / "kernel.png", "--weights", tmp_path / "w.safetensors")
    assert run("recover", "--data", tmp_path / "data", *command, "--out", tmp_path / "out").code == 0
    assert run("recover", tmp_path / "data/a3.png", *command, "--out", tmp_path / "alone").code == 0
    assert np.array_equal(recovered(tmp_path / "out")["a3"].numpy(), np.load(tmp_path / "alone/a3.npy"))
    assert load_image(tmp_path / "alone/a3.png").shape == (1, 16, 14)


def test_pictures_in_color(run: Run, tmp_path: Path) -> None:
    """A gray regularizer on each channel; the results are those of the command for one image."""
    dr.save(random_red(scale=0.03, double=False, channels=4), tmp_path / "w.safetensors", {"mu": MU})
    (tmp_path / "data").mkdir()
    for i in range(3):
        save_image(tmp_path / f"data/c{i}.png", images(3, 12, 10, seed=i, dtype=torch.float32))
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for i in range(3):
            archive.add(tmp_path / f"data/c{i}.png", f"c{i}.png")
    command = ("--color", "--problem", "inpaint", "--sigma", 0.02, "--weights", tmp_path / "w.safetensors")
    many = (*command, "--out")
    assert run("recover", "--data", tmp_path / "data", *many, tmp_path / "out").code == 0
    assert run("recover", "--data", tmp_path / "c.tar", *many, tmp_path / "tar").code == 0
    assert run("recover", tmp_path / "data/c0.png", *command, "--out", tmp_path / "alone").code == 0
    alone = np.load(tmp_path / "alone/c0.npy")
    assert alone.shape == (3, 12, 10)
    for out in ("out", "tar"):
        assert np.array_equal(recovered(tmp_path / out)["c0"].numpy(), alone)
    assert run("recover", "--data", tmp_path / "data", *command, "--images", "png", "--out", tmp_path / "png").code == 0
    with tarfile.open(tmp_path / "png/units/000000.tar") as archive:
        file = archive.extractfile("c1.png")
        assert file is not None
        (tmp_path / "c1.png").write_bytes(file.read())
    assert load_image(tmp_path / "c1.png", color=True).shape == (3, 12, 10)
