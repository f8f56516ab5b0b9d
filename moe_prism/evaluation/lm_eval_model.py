"""An elastic checkpoint as a model of lm-eval: ``lm_eval --model moe_prism --model_args pretrained=DIR,k_active=8``.

Everything but loading is lm-eval's own Hugging Face model, so tasks, batching and scores are the same code for every
budget and for the original. Needs ``pip install moe-prism[eval]``. How lm-eval finds the name:
:mod:`moe_prism.evaluation.lm_eval_plugin`.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

from moe_prism import elastic
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.errors import PrismError

# Arguments of lm-eval's Hugging Face model that load weights in another way: they would silently do nothing here.
_LOADING = frozenset(
    {
        "parallelize",
        "tp_plan",
        "max_memory_per_gpu",
        "max_cpu_memory",
        "offload_folder",
        "peft",
        "delta",
        "autogptq",
        "gptqmodel",
        "gguf_file",
        "subfolder",
        "revision",
    }
)


@register_model("moe_prism")
class MoePrismLM(HFLM):  # type: ignore[misc]  # lm-eval has no type information
    """HFLM over an elastic checkpoint at one budget.

    Args:
        pretrained: Directory of an elastic checkpoint.
        k_active: Budget, 1..full budget; the full budget by default.
        verify: Compare all files with their checksums before loading.
        dtype: As in HFLM: ``auto``, ``float32``, ``bfloat16``, ...
        kwargs: All other arguments of HFLM, as long as they do not load weights in a way of their own.

    Raises:
        PrismError: before anything is loaded: not an elastic checkpoint, a budget out of range, or an argument
            that has no meaning here.
    """

    def __init__(self, pretrained: str, k_active: int | None = None, verify: bool = True, **kwargs: Any) -> None:
        accepted = set(signature(HFLM.__init__).parameters) - _LOADING - {"self", "kwargs"}
        refused = sorted(set(kwargs) - accepted)
        if refused:
            raise PrismError(f"--model moe_prism has no argument {', '.join(refused)}; leave it out or use --model hf")
        full = open_checkpoint(Path(pretrained), verify=False).elastic.full_budget
        budget = full if k_active is None else k_active
        if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= full:
            raise PrismError(f"k_active must be a whole number in 1..{full} (the full budget), got {k_active!r}")
        self.k_active = budget
        self._verify = verify
        self._dtype = _dtype(kwargs.get("dtype"))
        super().__init__(pretrained=pretrained, **kwargs)

    def _create_model(self, pretrained: str, **_: Any) -> None:
        """Called by HFLM in place of its own loading; what else it passes is at its default, see ``_LOADING``."""
        self._model = elastic.load_elastic(pretrained, dtype=self._dtype, verify=self._verify).to(self.device)
        elastic.set_budget(self._model, self.k_active)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval writes this into its results file: the budget is part of what was measured."""
        info: dict[str, Any] = super().get_model_info()
        return {**info, "k_active": self.k_active, "full_budget": elastic.full_budget(self.model)}


def _dtype(name: str | torch.dtype | None) -> str | torch.dtype:
    if name is None or name == "auto" or isinstance(name, torch.dtype):
        return name or "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PrismError(f"dtype {name!r} is not one of torch's; use auto, float32, bfloat16 or float16")
    return found
