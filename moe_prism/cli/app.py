"""The typer application: collects the commands, each from its own file."""

from __future__ import annotations

import typer

from .bench import bench
from .demo import demo
from .export import export
from .generate import generate
from .inspect import inspect
from .pack import pack
from .plan import plan
from .profile_cost import profile_cost
from .refactor import refactor
from .restore import restore
from .serve import serve
from .simulate import simulate
from .sweep import sweep
from .vllm_config import vllm_config
from .vllm_cost import vllm_cost

app = typer.Typer(
    name="moe-prism",
    help="A quality dial for stock Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    refactor,
    sweep,
    profile_cost,
    generate,
    serve,
    inspect,
    restore,
    export,
    pack,
    plan,
    demo,
    simulate,
    vllm_config,
    vllm_cost,
):
    app.command(no_args_is_help=command is not demo)(command)
app.add_typer(bench, name="bench")
