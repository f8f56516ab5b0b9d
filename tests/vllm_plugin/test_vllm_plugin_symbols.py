from __future__ import annotations

import subprocess
import sys

import pytest

from moe_prism.vllm_plugin.symbols import SYMBOLS, Symbol, moved

# What stands for vLLM here is the standard library: the check knows names only.
PRESENT = (
    Symbol("json"),
    Symbol("json:dumps", ("obj", "indent")),
    Symbol("json:JSONEncoder.encode", ("o",)),
    Symbol("moe_prism.scheduling.requests:StepPlan", fields=("admit", "budgets")),
)


def test_what_is_there_is_not_reported() -> None:
    assert moved(PRESENT) == []


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        (Symbol("no_such_module:x"), "no_such_module:x cannot be imported"),
        (Symbol("json:nothing"), "json:nothing is gone"),
        (Symbol("json:JSONEncoder.nothing"), "json:JSONEncoder.nothing is gone"),
        (Symbol("json:dumps", ("obj", "sizes")), "json:dumps no longer takes sizes"),
        (
            Symbol("moe_prism.scheduling.requests:StepPlan", fields=("admit", "speed")),
            "moe_prism.scheduling.requests:StepPlan no longer has speed",
        ),
    ],
)
def test_what_moved_is_named(symbol: Symbol, words: str) -> None:
    found = moved((*PRESENT, symbol))
    assert len(found) == 1
    assert found[0].startswith(words)


def test_every_symbol_is_named_once() -> None:
    assert len({symbol.path for symbol in SYMBOLS}) == len(SYMBOLS)


IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise AssertionError(f"somebody imported {name}")

sys.meta_path.insert(0, Blocked())
import moe_prism
for module in pkgutil.walk_packages(moe_prism.__path__, "moe_prism."):
    ours = module.name.startswith("moe_prism.vllm_plugin.")
    if not ours and not module.name.endswith(("triton_kernels", "triton_block_kernels", "lm_eval_model")):
        importlib.import_module(module.name)
import moe_prism.vllm_plugin
assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"]
"""


def test_the_package_never_imports_vllm() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
