"""Packed parameters are those of now: made once for each version of them, and again whenever anything has changed."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from deepreg_fast.backend.gpu import packed as gpu_packed
from deepreg_fast.backend.gpu.memory import recording

CPU = torch.device("cpu")


class _Calls:
    """Packs by copying, and counts."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.count = net, 0

    def __call__(self, *settings: object) -> list[tuple[Tensor, Tensor]]:
        parameters = list(self.net.parameters())

        def pack() -> list[tuple[Tensor, Tensor]]:
            self.count += 1
            return [(parameters[0].detach().clone(), parameters[1].detach().clone())]

        return gpu_packed.packed(self.net, parameters, settings, CPU, pack)


def test_packed_once_for_each_version() -> None:
    net = nn.Linear(2, 3)
    packed = _Calls(net)
    first = packed("none")
    assert packed("none") is first and packed.count == 1
    with torch.no_grad():
        net.bias.add_(1.0)
    assert torch.equal(packed("none")[0][1], net.bias) and packed.count == 2
    packed("pixel")
    assert packed.count == 3
    # A new parameter with the count of the old one, in its place and in other memory.
    net.bias = nn.Parameter(net.bias.detach().clone())
    assert torch.equal(packed("pixel")[0][1], net.bias) and packed.count == 4
    net.bias.data = torch.full((3,), 7.0)
    assert torch.equal(packed("pixel")[0][1], net.bias) and packed.count == 5


def test_parameters_without_a_count_are_packed_each_time() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 3)
    packed = _Calls(net)
    packed()
    packed()
    assert packed.count == 2


def test_what_is_packed_goes_with_its_network() -> None:
    net = nn.Linear(2, 3)
    packed = _Calls(net)
    ours = weakref.ref(packed()[0][0])
    del net, packed
    gc.collect()
    assert ours() is None


def test_a_graph_packs_once_from_memory_that_it_keeps() -> None:
    net, other = nn.Linear(2, 3), nn.Linear(2, 3)
    packed, others = _Calls(net), _Calls(other)
    before = packed()
    with recording(CPU) as graph:
        first = packed()
        assert packed() is first and first is not before and packed("pixel") is not first
        assert others() is not first
    assert packed.count == 3 and others.count == 1
    assert packed() is before, "what a recording packs is not there before its graph has run"
    kept = {t.data_ptr() for t in graph.held if isinstance(t, Tensor)}
    assert kept == {p.data_ptr() for m in (net, other) for p in m.parameters()}
