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
from .arguments import Quality, quality_of
from .setup import Setup, setup_of

_MARK = "_moe_prism"


def install() -> None:
    """From now on every ``InputProcessor`` of this process also checks ours; doing it twice changes nothing.

    One is made before the engine's processes are, so a configuration that cannot work is refused then and there.
    """
    construct, validate = InputProcessor.__init__, InputProcessor._validate_params
    if hasattr(validate, _MARK):
        return

    @functools.wraps(construct)
    def constructed(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _MARK, setup_of(vllm_config))
        construct(self, vllm_config, *args, **kwargs)

    @functools.wraps(validate)
    def checked(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, SamplingParams):
            _check(getattr(self, _MARK), params.extra_args)
        return validate(self, params, *args, **kwargs)

    setattr(checked, _MARK, True)
    InputProcessor.__init__, InputProcessor._validate_params = constructed, checked


def _check(setup: Setup | None, extra_args: dict[str, Any] | None) -> None:
    if setup is None:
        asked = [key for key in Quality._fields if extra_args and key in extra_args]
        if asked:
            raise VLLMValidationError(
                f"vllm_xargs.{asked[0]}: this server has no budgets; start it with the file of `moe-prism vllm-config`"
            )
        return
    try:
        quality_of(extra_args, setup.elastic.full_budget, setup.floor)
    except PrismError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
