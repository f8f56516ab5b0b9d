"""Refuses a request's impossible arguments where vLLM checks its own: in the front end, with a 400.

The engine's process never sees them. Knows nothing of what budgets do.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from ..errors import PrismError
from .arguments import quality_of
from .setup import setup_of

_KEYS = ("k_min", "k_active", "ttft_ms", "tpot_ms")
_MARK = "_moe_prism"


def install() -> None:
    """From now on every ``InputProcessor`` of this process also checks ours; doing it twice changes nothing."""
    original = InputProcessor._validate_params
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def checked(self: Any, params: Any, supported_tasks: Any) -> Any:
        if isinstance(params, SamplingParams):
            _check(self, params)
        return original(self, params, supported_tasks)

    setattr(checked, _MARK, True)
    InputProcessor._validate_params = checked


def _check(processor: Any, params: Any) -> None:
    if _MARK not in processor.__dict__:
        processor.__dict__[_MARK] = setup_of(processor.vllm_config)
    setup = processor.__dict__[_MARK]
    if setup is None:
        asked = [key for key in _KEYS if params.extra_args and key in params.extra_args]
        if asked:
            raise VLLMValidationError(
                f"vllm_xargs.{asked[0]}: this server has no budgets; start it with the file of `moe-prism vllm-config`"
            )
        return
    try:
        quality_of(params.extra_args, setup.elastic.full_budget, setup.floor)
    except PrismError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
