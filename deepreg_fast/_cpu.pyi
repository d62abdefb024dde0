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
        whole: bool,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def current(self) -> bool: ...
    def kept(self, b: int, height: int, width: int) -> int: ...
    def gradient(
        self, x: int, value: int, grad: int, kept: int, b: int, height: int, width: int, threads: int
    ) -> None: ...
    def hvp(self, x: int, v: int, kept: int, out: int, b: int, height: int, width: int, threads: int) -> None: ...
    def param_vjp(self, x: int, v: int, kept: int, out: int, b: int, height: int, width: int, threads: int) -> None: ...

class Ridge:
    def __init__(
        self, filters: int, side: int, steps: int, center: float, w: int, c: int, s: int, isa: str
    ) -> None: ...
    def kept(self, height: int, width: int) -> int: ...
    def gradient(
        self, x: int, value: int, grad: int, kept: int, b: int, height: int, width: int, threads: int
    ) -> None: ...
    def hvp(self, v: int, kept: int, out: int, b: int, height: int, width: int, threads: int) -> None: ...
    def param_vjp(self, x: int, v: int, dw: int, dc: int, b: int, height: int, width: int, threads: int) -> None: ...

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
    def apply(
        self, product: int, count: int, threads: int, x: int, y: int, weight: int, one: float, out: int
    ) -> None: ...

class Tv:
    def __init__(self, channels: int, eps: float, isa: str) -> None: ...
    def kept(self, height: int, width: int) -> int: ...
    def gradient(
        self, x: int, value: int, grad: int, kept: int, b: int, height: int, width: int, threads: int
    ) -> None: ...
    def hvp(self, v: int, kept: int, out: int, b: int, height: int, width: int, threads: int) -> None: ...

class Vectors:
    def __init__(self, isa: str) -> None: ...
    def dot(self, count: int, n: int, threads: int, a: int, b: int, out: int) -> None: ...
    def add(self, count: int, n: int, threads: int, x: int, s: int, p: int, rows: int, out: int, size: int) -> None: ...
    def secant(
        self, count: int, n: int, threads: int, idx: int, candidate: int, candidate_g: int, x: int, g: int, out: int
    ) -> None: ...
    def remember(
        self,
        count: int,
        n: int,
        threads: int,
        idx: int,
        memory: int,
        state: list[int],
        slot: int,
        fresh: int,
        x: int,
        f: int,
        gram: int,
        rhs: int,
    ) -> None: ...
    def combine(
        self,
        count: int,
        n: int,
        threads: int,
        idx: int,
        memory: int,
        state: list[int],
        c: int,
        limit: int,
        x: int,
        f: int,
        out: int,
    ) -> None: ...
