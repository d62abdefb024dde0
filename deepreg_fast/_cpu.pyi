from collections.abc import Sequence

def instruction_sets() -> list[str]: ...

class ConvChain:
    def __init__(
        self,
        weights: Sequence[int],
        biases: Sequence[int],
        channels: int,
        head: int,
        alpha: float,
        center: float,
        gain: float,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def gradient(self, x: int, value: int, grad: int, planes: int, b: int, h: int, w: int, threads: int) -> None: ...
    def hvp(self, v: int, planes: int, out: int, b: int, h: int, w: int, threads: int) -> None: ...
    def param_vjp(self, x: int, v: int, out: int, b: int, h: int, w: int, threads: int) -> None: ...
