"""Makes stock lm-eval 0.4.13 know ``--model moe_prism``, at the price of nothing for other programs.

lm-eval has entry points for models only after 0.4.13: ``lm_eval.models``, which this project declares too. Up to
0.4.13 a name must be in its registry before user code runs, and no option of its command line imports a module. What
it does import before looking the name up is torch, and torch calls the entry points of the group ``torch.backends``.
:func:`register` is one of them: it enters the name into lm-eval's registry if lm-eval is the program that imports
torch, and returns at once otherwise. Imports nothing heavy; knows nothing of the model.

With ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, or where a program imported torch before lm-eval, import
:mod:`moe_prism.evaluation.lm_eval_model` instead, which registers the same name.
"""

from __future__ import annotations

import logging
import sys

NAME = "moe_prism"
TARGET = "moe_prism.evaluation.lm_eval_model:MoePrismLM"


def register() -> None:
    """Enters the model's name with its import path, unless it is there already or this is not lm-eval.

    Must not raise: an exception here would break ``import torch``.
    """
    if "lm_eval" not in sys.modules:
        return
    try:
        # its built-in names first: lm-eval adds them on demand only while its registry is empty
        import lm_eval.models  # type: ignore[import-untyped]  # noqa: F401
        from lm_eval.api.registry import model_registry  # type: ignore[import-untyped]

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception:  # another version of lm-eval than the one this was written for
        logging.getLogger(__name__).warning("--model %s is not available in this lm-eval", NAME, exc_info=True)
