"""A wider network, or one of larger filters, that starts as the function a trained smaller one is (Net2Net)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .red import RED

_GROWING = ("channels", "kernel_size")


def grow(small: RED, large: RED) -> None:
    """Make `large` equal to `small` as a function, its further channels ready to be trained.

    `large` has no fewer channels and no smaller filters, and is like `small` in all else, without LayerNorm. The
    filters of `small` stand in the middle of those of `large`; what `large` has more keeps its initial weights, but is
    not listened to: the old channels' and the output's weights for it are zero. (Chen, Goodfellow, Shlens 2016.)

    Raises
    ------
    InputError
        If the two differ in anything else.
    """
    a, b = small.describe(), large.describe()
    differing = sorted(k for k in b if k not in _GROWING and a.get(k) != b[k])
    if differing or any(a[k] > b[k] for k in _GROWING) or a["norm"] != "none":
        raise InputError(
            "A network can start from one without LayerNorm that has no more channels, no larger filters, and is like "
            f"it in all else, but this one is {_told(b)} and that one {_told(a)}; change the settings or the weights."
        )
    with torch.no_grad():
        for old, new in zip(small.net.convs, large.net.convs, strict=True):
            assert isinstance(old, nn.Conv2d) and isinstance(new, nn.Conv2d)
            assert old.bias is not None and new.bias is not None
            outs, ins = old.weight.shape[:2]
            edge = (b["kernel_size"] - a["kernel_size"]) // 2
            new.weight[:outs] = 0.0
            inner = slice(edge, edge + a["kernel_size"])
            new.weight[:outs, :ins, inner, inner] = old.weight
            new.bias[:outs] = old.bias


def _told(description: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in description.items() if k != "kind")
