"""The moments before a step and its forward pass, in vLLM's two model runners: whose tokens they are, in their order.

``watch`` is all that the worker knows of a runner. What concerns the second runner (GPUs with Triton) is written to
vLLM's code and has not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# what the scheduler said of the step that begins; None when it has ended, and for a dummy step
Begin = Callable[[Any], None]
# ids of the requests in the order of the batch, and the tokens of the forward pass, padding at the end included
Tell = Callable[[Sequence[str], int], None]


def watch(runner: Any, second: bool, begin: Begin, tell: Tell) -> None:
    """From now on ``begin`` is called around every step, and ``tell`` before every forward pass.

    The runner's own method is where every executor goes: Ray's compiled graphs call it without asking the worker.

    Args:
        runner: vLLM's, with its model loaded.
        second: whether it is the second kind.
        begin: see ``Begin``.
        tell: see ``Tell``; dummy runs may have it called, too.
    """
    _watch_steps(runner, begin)
    if second:
        _watch_second(runner, tell)
    else:
        _watch_first(runner, tell)


def _watch_steps(runner: Any, begin: Begin) -> None:
    execute = runner.execute_model

    def run(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        begin(None if kwargs.get("dummy_run") else scheduler_output)  # the second runner's dummy steps come this way
        try:
            return execute(scheduler_output, *args, **kwargs)
        finally:
            begin(None)

    runner.execute_model = run


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
