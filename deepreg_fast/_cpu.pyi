from collections.abc import Sequence

def instruction_sets() -> list[str]: ...
def multiply_adds(isa: str, threads: int, scale: int) -> float: ...

class ConvChain:
    def __init__(
        self,
        weights: Sequence[int],
        biases: Sequence[int],
        gammas: Sequence[int],
        betas: Sequence[int],
        channels: int,
        head: int,
        alpha: float,
        center: float,
        gain: float,
        eps: float,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def current(self) -> bool: ...
    def gradient(
        self,
        x: int,
        value: int,
        grad: int,
        planes: int,
        scalars: int,
        h: int,
        b: int,
        height: int,
        width: int,
        threads: int,
    ) -> None: ...
    def hvp(
        self, v: int, planes: int, scalars: int, h: int, out: int, b: int, height: int, width: int, threads: int
    ) -> None: ...
    def param_vjp(
        self, x: int, v: int, planes: int, scalars: int, h: int, out: int, b: int, height: int, width: int, threads: int
    ) -> None: ...

class Srm:
    def __init__(
        self,
        transform: int,
        channels: int,
        height: int,
        width: int,
        block: int,
        measurements: int,
        rows: int,
        signs: int,
        perm: int,
        columns_matrix: int,
        lines_matrix: int,
        isa: str,
    ) -> None: ...
    def apply(self, product: int, count: int, threads: int, x: int, y: int, weight: int, out: int) -> None: ...
