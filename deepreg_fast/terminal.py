"""What the commands print: on terminals of any width and encoding, in pipes, and where there is none at all."""

from __future__ import annotations

import codecs
import contextlib
import os
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

ERRORS = "deepreg-plain"
"""The error handler that replaces what an encoding lacks."""
INTERVAL = 30.0
"""Seconds between two lines of `Pulse`."""

_WORDS = """× x  − -  – -  — -  … ...  ᵀ T  β beta  λ lambda  μ mu  σ sigma  ≤ <=  ≥ >=  “ "  ” "  ‘ '  ’ '
± +-  ² 2  → ->"""
_PLAIN: dict[str, str] = {pair[0]: pair[2:] for pair in _WORDS.replace("\n", "  ").split("  ")}
_PLAIN |= dict.fromkeys("─━═╌┄", "-") | dict.fromkeys("│┃║", "|") | dict.fromkeys("•●·", "*")
_PLAIN |= dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┡┩┢┪╇╈╞╡╪╤╧╔╗╚╝", "+")
_CONTROL = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    """ASCII for the characters that an encoding lacks; bytes of file names that are no text as `\\udcfc`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return plain, error.end


codecs.register_error(ERRORS, _replace)


def prepare() -> None:
    """Let stdout and stderr take every text: what they cannot encode is replaced, and where there is none (as under
    pythonw) the text is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(Exception):
                stream.reconfigure(errors=ERRORS)


def drop() -> None:
    """Send what is still to be printed nowhere: the reader of a pipe has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # The stream itself stays, and with it what Python flushes when it ends.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person may watch the stream."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def width(stream: TextIO | None) -> int | None:
    """Columns of a terminal; None for anything else, which takes lines of any length."""
    return max(1, shutil.get_terminal_size().columns) if is_terminal(stream) else None


def visible(text: str) -> str:
    """The text with its control characters written out, so that no file name can move the cursor."""
    return text.translate(_CONTROL)


def say(text: str) -> None:
    """A line on stderr, if there is one: what is only told must not end what is done."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        line = visible(text) + "\n"
        encoding = getattr(stream, "encoding", None)
        stream.write(line.encode(encoding, ERRORS).decode(encoding) if encoding else line)
        stream.flush()
    except (OSError, ValueError):
        pass


def cells(text: str) -> int:
    """Columns that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in visible(text)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", columns: int | None = None) -> str:
    """Rows in columns that are as wide as their texts; where these do not fit `columns`, each row as lines of
    `head: text`. No text is ever cut off.

    A row with fewer texts than `head` has a last text that runs on over the other columns.
    """
    found = [[visible(str(t)) for t in row] for row in rows]
    first = [title] if title else []
    whole = [r for r in found if len(r) == len(head)]
    wide = [max(cells(t) for t in column) for column in zip(head, *whole, strict=True)]
    right = [bool(whole) and all(_number(r[i]) for r in whole if r[i]) for i in range(len(head))]
    lines = [_line(head, wide, right), "  ".join("─" * n for n in wide)]
    lines += [_line(r, wide, right) for r in found]
    if columns is None or max(map(cells, lines[:1] + [_line(r, wide, right) for r in whole])) <= columns:
        return "\n".join([*first, *lines])
    blocks = []
    for row in found:
        named = [(h, t) for h, t in zip(head, row, strict=False) if t]
        blocks.append("\n".join(f"{'' if i == 0 else '  '}{h}: {t}" for i, (h, t) in enumerate(named)))
    return "\n".join([*first, *blocks])


def _number(text: str) -> bool:
    return text.lstrip("+-−")[:1].isdigit()


def _line(texts: Sequence[str], wide: Sequence[int], right: Sequence[bool]) -> str:
    out = []
    for i, text in enumerate(texts):
        last = len(texts) < len(wide) and i + 1 == len(texts)
        space = " " * (0 if last else wide[i] - cells(text))
        out.append(space + text if right[i] else text + space)
    return "  ".join(out).rstrip()


def facts(pairs: Iterable[tuple[str, str]], columns: int | None = None) -> str:
    """Names and texts in two columns; long texts go on under their beginning."""
    found = [(visible(k), visible(v)) for k, v in pairs]
    indent = max((cells(k) for k, _ in found), default=0) + 2
    lines = []
    for name, text in found:
        if columns is not None and columns < indent + 20:
            lines.append(f"{name}: {text}")
            continue
        start = name + " " * (indent - cells(name))
        if columns is None:
            lines.append((start + text).rstrip())
        else:
            parts = textwrap.wrap(text, columns - indent, break_long_words=False, break_on_hyphens=False) or [""]
            lines += [((start if i == 0 else " " * indent) + part).rstrip() for i, part in enumerate(parts)]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two figures or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Pulse:
    """A line on stderr every half minute while a long command runs: what is done, what is left, when it may end.

        with Pulse("evaluate", len(methods), "methods") as pulse:
            for m in methods:
                pulse.begin(m.name)
                ...
                pulse.done()

    A thread of its own prints, so that a step of minutes is seen, too.

    Parameters
    ----------
    what, total, unit : the command, and how many parts of which kind it has
    start : parts that were done before
    interval : seconds between two lines; by default `INTERVAL`
    clock, wall : seconds, of a clock that never jumps and of the day
    say : what prints a line
    """

    def __init__(  # noqa: PLR0913 - the last four for tests
        self,
        what: str,
        total: int,
        unit: str = "parts",
        start: int = 0,
        *,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        say: Callable[[str], None] = say,
    ) -> None:
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self.count, self.text = start, ""
        self._interval = INTERVAL if interval is None else interval
        self._clock, self._wall, self._say = clock, wall, say
        self._began = clock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, text: str) -> None:
        """What is being done now."""
        self.text = text

    def done(self, count: int | None = None, text: str | None = None) -> None:
        """One part more is done, or `count` of them in all."""
        self.count = self.count + 1 if count is None else count
        self.text = self.text if text is None else text

    def line(self) -> str:
        """The line of this moment."""
        passed, new = self._clock() - self._began, self.count - self.start
        left = max(0, self.total - self.count)
        out = f"{self.what}: {self.count} of {self.total} {self.unit} done, {left} left"
        out += f" ({self.text})" if self.text else ""
        if new <= 0:
            return f"{out}; {duration(passed)} so far"
        rest = passed / new * left
        end = time.strftime("%H:%M", time.localtime(self._wall() + rest))
        return f"{out}; {duration(passed)} so far, about {duration(rest)} left, until {end}"

    def beat(self) -> None:
        """Print the line now."""
        self._say(self.line())

    def __enter__(self) -> Pulse:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Print no more."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            self.beat()


def console(stream: TextIO | None) -> Any:
    """A rich console on a stream, for bars: texts are taken as they are, not as markup."""
    from rich.console import Console

    return Console(file=stream or open(os.devnull, "w", encoding="utf-8"), markup=False, highlight=False)
