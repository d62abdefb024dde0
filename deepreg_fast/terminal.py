"""Printing for the commands: on terminals of any width and encoding, in pipes, and without any stream."""

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
"""Name of the error handler that replaces characters that an encoding lacks."""
INTERVAL = 30.0
"""Seconds between two lines of `Pulse`."""

_WORDS = """× x  − -  – -  — -  … ...  ᵀ T  β beta  λ lambda  μ mu  σ sigma  ≤ <=  ≥ >=  “ "  ” "  ‘ '  ’ '
± +-  ² 2  → ->"""
_PLAIN: dict[str, str] = {pair[0]: pair[2:] for pair in _WORDS.replace("\n", "  ").split("  ")}
_PLAIN |= dict.fromkeys("─━═╌┄", "-") | dict.fromkeys("│┃║", "|") | dict.fromkeys("•●·", "*")
_PLAIN |= dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛┡┩┢┪╇╈╞╡╪╤╧╔╗╚╝", "+")
_CONTROL = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    """ASCII for characters that an encoding lacks; undecodable bytes of file names become `\\udcfc`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return plain, error.end


codecs.register_error(ERRORS, _replace)


def prepare() -> None:
    """Make stdout and stderr accept any text: characters that they cannot encode are replaced. If there is no stream
    (as under pythonw), text is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(Exception):
                stream.reconfigure(errors=ERRORS)


def drop() -> None:
    """Discard all further output, after the reader of a pipe has closed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # The stream stays open, and Python flushes it at exit.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def width(stream: TextIO | None) -> int | None:
    """Columns of a terminal; None for any other stream, whose lines may have any length."""
    return max(1, shutil.get_terminal_size().columns) if is_terminal(stream) else None


def visible(text: str) -> str:
    """The text with escaped control characters, so that no file name can move the cursor."""
    return text.translate(_CONTROL)


def say(text: str) -> None:
    """Print a line on stderr, if there is one. Errors are ignored, because a message must not stop the work."""
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
    """Number of columns that a text occupies."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in visible(text)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", columns: int | None = None) -> str:
    """A table whose columns are as wide as their texts. If it does not fit `columns`, each row becomes lines of
    `head: text`. Text is never truncated.

    In a row with fewer texts than `head`, the last text extends over the remaining columns.
    """
    visible_rows = [[visible(str(t)) for t in row] for row in rows]
    title_lines = [title] if title else []
    full_rows = [r for r in visible_rows if len(r) == len(head)]
    widths = [max(cells(t) for t in column) for column in zip(head, *full_rows, strict=True)]
    align_right = [bool(full_rows) and all(_number(r[i]) for r in full_rows if r[i]) for i in range(len(head))]
    lines = [_line(head, widths, align_right), "  ".join("─" * n for n in widths)]
    lines += [_line(r, widths, align_right) for r in visible_rows]
    if columns is None or max(map(cells, lines[:1] + [_line(r, widths, align_right) for r in full_rows])) <= columns:
        return "\n".join([*title_lines, *lines])
    blocks = []
    for row in visible_rows:
        named = [(h, t) for h, t in zip(head, row, strict=False) if t]
        blocks.append("\n".join(f"{'' if i == 0 else '  '}{h}: {t}" for i, (h, t) in enumerate(named)))
    return "\n".join([*title_lines, *blocks])


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
    """Names and texts in two columns; long texts are wrapped within their column."""
    visible_pairs = [(visible(k), visible(v)) for k, v in pairs]
    indent = max((cells(k) for k, _ in visible_pairs), default=0) + 2
    lines = []
    for name, text in visible_pairs:
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
    """A duration in seconds, minutes or hours, to about two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Pulse:
    """Prints a line on stderr every half minute during a long command: parts done, parts left, estimated end.

        with Pulse("evaluate", len(methods), "methods") as pulse:
            for m in methods:
                pulse.begin(m.name)
                ...
                pulse.done()

    A separate thread prints, so lines also appear during steps of minutes.

    Parameters
    ----------
    what, total, unit : the command, its number of parts and their name
    start : parts done before
    interval : seconds between two lines; by default `INTERVAL`
    clock, wall : monotonic clock and wall clock, in seconds
    say : prints a line
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
        """Set the text for the current part."""
        self.text = text

    def done(self, count: int | None = None, text: str | None = None) -> None:
        """Record that one more part is done, or `count` in total."""
        self.count = self.count + 1 if count is None else count
        self.text = self.text if text is None else text

    def line(self) -> str:
        """The current line."""
        passed, new = self._clock() - self._began, self.count - self.start
        remaining = max(0, self.total - self.count)
        out = f"{self.what}: {self.count} of {self.total} {self.unit} done, {remaining} left"
        out += f" ({self.text})" if self.text else ""
        if new <= 0:
            return f"{out}; {duration(passed)} so far"
        remaining_seconds = passed / new * remaining
        end = time.strftime("%H:%M", time.localtime(self._wall() + remaining_seconds))
        return f"{out}; {duration(passed)} so far, about {duration(remaining_seconds)} left, until {end}"

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
        """Stop printing and end the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            self.beat()


def console(stream: TextIO | None) -> Any:
    """A rich console on a stream, for progress bars, without markup."""
    from rich.console import Console

    return Console(file=stream or open(os.devnull, "w", encoding="utf-8"), markup=False, highlight=False)
