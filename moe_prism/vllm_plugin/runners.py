"""The moment before a forward pass, in vLLM's two model runners: whose tokens they are, in their order.

``watch`` is all that the worker knows of a runner. What concerns the second runner (GPUs with Triton) is written to
vLLM's code and has not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# ids of the requests in the order of the batch, and the tokens of the forward pass, padding at the end included
Tell = Callable[[Sequence[str], int], None]


def watch(runner: Any, second: bool, tell: Tell) -> None:
    """From now on ``tell`` is called before every forward pass, dummy runs included.

    Args:
        runner: vLLM's, with its model loaded.
        second: whether it is the second kind.
        tell: see ``Tell``.
    """
    if second:
        _watch_second(runner, tell)
    else:
        _watch_first(runner, tell)


def _watch_first(runner: Any, tell: Tell) -> None:
    forward = runner._model_forward

    def run(*args: Any, **kwargs: Any) -> Any:
        given = next(v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if v is not None)
        tell(runner.input_batch.req_ids, len(given))
        return forward(*args, **kwargs)

    runner._model_forward = run


def _watch_second(runner: Any, tell: Tell) -> None:
    state = runner.model_state
    prepare = state.prepare_inputs

    def run(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tell(input_batch.req_ids, input_batch.num_tokens_after_padding)
        return prepare(input_batch, *args, **kwargs)

    state.prepare_inputs = run
