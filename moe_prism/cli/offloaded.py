"""What ``generate`` shows of an offloaded model: a line that changes while text is written, and one in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.text import Text
from transformers import TextStreamer

from ..offload import Statistics
from .console import err

if TYPE_CHECKING:
    from ..offload.manager import Manager
    from ..offload.pace import Pace


def line(counted: Statistics, pace: Pace | None) -> str:
    """Statistics in words."""
    parts = [
        f"{counted.hit_rate:.1%} found in memory",
        f"{counted.bytes_read / 1e9:.2f} GB read",
        f"{counted.stall_seconds:.2f} s waited",
        f"read ahead {counted.ahead_right} of {counted.ahead} right, {counted.cancelled} ended early",
    ]
    if pace is not None:
        low = f", {pace.mean_low:.1f} of it at 4 bits" if pace.low else ""
        parts.append(f"mean budget {pace.mean_budget:.1f}{low}")
    return "blocks: " + ", ".join(parts)


class _Shown(TextStreamer):
    """Keeps the text, and shows it with the line below."""

    def __init__(self, tokenizer: Any, prompt: str, manager: Manager, pace: Pace | None, live: Live) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.text, self._manager, self._pace, self._live = prompt, manager, pace, live
        self._tokens, self._begin = 0, time.perf_counter()

    def put(self, value: Any) -> None:
        """Count tokens; the first call brings the prompt."""
        super().put(value)  # type: ignore[no-untyped-call]
        self._tokens += 1
        speed = f"{(self._tokens - 1) / max(1e-9, time.perf_counter() - self._begin):.2f} tokens/s, "
        shown = Text(self.text + "\n")
        shown.append(speed + line(self._manager.statistics, self._pace), style="dim")
        self._live.update(shown)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that will not change any more."""
        self.text += text


@contextmanager
def shown(tokenizer: Any, prompt: str, manager: Manager, pace: Pace | None) -> Iterator[TextStreamer]:
    """A streamer: on a terminal text with live statistics, elsewhere text as it comes; statistics in the end."""
    if not err.is_terminal:
        print(prompt, end="", flush=True)
        yield TextStreamer(tokenizer, skip_prompt=True)
    else:
        with Live(console=err, transient=True, refresh_per_second=4) as live:
            streamer = _Shown(tokenizer, prompt, manager, pace, live)
            yield streamer
        print(streamer.text)
    err.print(line(manager.statistics, pace), soft_wrap=True)
