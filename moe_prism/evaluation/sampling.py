"""Text that a model writes itself, for when no text is at hand.

It lets the tools work with no data at all; a loss measured on it says how far a budget moves the model
from itself, not how well it models anybody's text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "sampled-by-the-model"
_BATCH = 32


def sample_windows(
    model: Any, count: int, context: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """``count`` windows of ``context`` tokens, int64, each written from the beginning-of-text token at temperature 1.

    Args:
        model: a causal language model.
        count: windows.
        context: tokens of each, the first one included.
        seed: of the sampling; the global random state is left as it was.
        progress: called with (windows done, windows in all).
    """
    import torch

    config = model.config.get_text_config()
    start = config.bos_token_id if config.bos_token_id is not None else 0
    out = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for done in range(0, count, _BATCH):
            prompt = torch.full((min(_BATCH, count - done), 1), start, device=model.device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=context - 1,
                max_new_tokens=context - 1,
                pad_token_id=start,
            )
            out.append(written.cpu())
            if progress:
                progress(done + len(written), count)
    return torch.cat(out)


@contextmanager
def sampled_text(
    model: Any, tokenizer: Any, tokens: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Iterator[Path]:
    """A temporary file of about ``tokens`` tokens of sampled text, one window a paragraph.

    Its last two path parts, which reports show, say where it comes from.
    """
    context = min(256, tokens)
    windows = sample_windows(model, -(-tokens // context), context, seed, progress)
    with TemporaryDirectory() as folder:
        path = Path(folder) / FOLDER / f"seed-{seed}.txt"
        path.parent.mkdir()
        path.write_text("\n".join(tokenizer.batch_decode(windows, skip_special_tokens=True)), encoding="utf-8")
        yield path
