from collections.abc import Sequence

from torch import Tensor

def instruction_sets() -> list[str]: ...
def multiply_adds(isa: str, threads: int, scale: int) -> float: ...

class ConvChain:
    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
        channels: int,
        head: int,
        alpha: float,
        center: float,
        gain: float,
        eps: float,
        image_norm: bool,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def current(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
    ) -> bool: ...
    def saved_floats(self, b: int, height: int, width: int) -> int: ...
    def gradient(
        self,
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        saved: Tensor | None,
        b: int,
        height: int,
        width: int,
        threads: int,
    ) -> None: ...
    def hvp(
        self, x: Tensor, v: Tensor, saved: Tensor, out: Tensor, b: int, height: int, width: int, threads: int
    ) -> None: ...
    def param_vjp(
        self, x: Tensor, v: Tensor, saved: Tensor, out: Tensor, b: int, height: int, width: int, threads: int
    ) -> None: ...

class Ridge:
    def __init__(
        self,
        filters: int,
        channels: int,
        side: int,
        steps: int,
        center: float,
        w: Tensor,
        c: Tensor,
        s: Tensor,
        isa: str,
    ) -> None: ...
    def saved_floats(self, height: int, width: int) -> int: ...
    def gradient(
        self,
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        saved: Tensor | None,
        b: int,
        height: int,
        width: int,
        threads: int,
    ) -> None: ...
    def hvp(self, v: Tensor, saved: Tensor, out: Tensor, b: int, height: int, width: int, threads: int) -> None: ...
    def param_vjp(
        self, x: Tensor, v: Tensor, dw: Tensor, dc: Tensor, b: int, height: int, width: int, threads: int
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
        rows: Tensor,
        signs: Tensor | None,
        perm: Tensor | None,
        column_matrix: Tensor | None,
        row_matrix: Tensor | None,
        isa: str,
    ) -> None: ...
    def current(self, rows: Tensor, signs: Tensor | None, perm: Tensor | None) -> bool: ...
    def apply(
        self,
        product: int,
        count: int,
        threads: int,
        x: Tensor | None,
        y: Tensor | None,
        weight: Tensor | None,
        one: float,
        out: Tensor,
    ) -> None: ...

class Tomography:
    def __init__(
        self, height: int, width: int, detectors: int, rays: Sequence[tuple[bool, bool, float, float]], isa: str
    ) -> None: ...
    def forward(self, x: Tensor, y: Tensor, count: int, threads: int) -> None: ...
    def adjoint(self, y: Tensor, x: Tensor, count: int, threads: int) -> None: ...

class Tv:
    def __init__(self, channels: int, eps: float, isa: str) -> None: ...
    def saved_floats(self, height: int, width: int) -> int: ...
    def gradient(
        self,
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        saved: Tensor | None,
        b: int,
        height: int,
        width: int,
        threads: int,
    ) -> None: ...
    def hvp(self, v: Tensor, saved: Tensor, out: Tensor, b: int, height: int, width: int, threads: int) -> None: ...

class Vectors:
    def __init__(self, isa: str) -> None: ...
    def dot(self, count: int, n: int, threads: int, a: Tensor, b: Tensor, out: Tensor) -> None: ...
    def add(
        self,
        count: int,
        n: int,
        threads: int,
        x: Tensor,
        s: Tensor,
        p: Tensor,
        rows: Tensor,
        out: Tensor,
        size: Tensor,
    ) -> None: ...
    def secant(
        self,
        count: int,
        n: int,
        threads: int,
        idx: Tensor,
        batch: int,
        candidate: Tensor,
        candidate_g: Tensor,
        x: Tensor,
        g: Tensor,
        out: Tensor,
    ) -> None: ...
    def remember(
        self,
        count: int,
        n: int,
        threads: int,
        idx: Tensor,
        batch: int,
        memory: int,
        state: Sequence[Tensor],
        slot: Tensor,
        fresh: Tensor,
        x: Tensor,
        f: Tensor,
        gram: Tensor,
        rhs: Tensor,
    ) -> None: ...
    def combine(
        self,
        count: int,
        n: int,
        threads: int,
        idx: Tensor,
        batch: int,
        memory: int,
        state: Sequence[Tensor],
        c: Tensor,
        limit: Tensor,
        x: Tensor,
        f: Tensor,
        out: Tensor,
    ) -> None: ...
