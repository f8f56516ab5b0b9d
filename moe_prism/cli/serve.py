"""``moe-prism serve``: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import Dtype


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the directory's name.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOE_PRISM_API_KEY", help="Needed below /v1/; none by default.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Scheduling policy.")] = "continuous",
    k_min: Annotated[int | None, typer.Option(help="Floor of requests that name none; full budget by default.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 256,
    memory_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts and outputs kept at once.")] = 16384,
    max_prefill: Annotated[int, typer.Option(min=1, help="Prompt tokens of one step.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 1 << 20,
    drain_seconds: Annotated[float, typer.Option(help="Time for running requests after SIGTERM.")] = 60.0,
    hopeless: Annotated[
        Literal["serve", "refuse"], typer.Option(help="Requests whose objectives no budget can meet.")
    ] = "serve",
    memory: Annotated[
        str | None, typer.Option(help="Of the whole process, e.g. 4GB; for a checkpoint that `moe-prism pack` wrote.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory.")] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare the files with their checksums first.")] = True,
) -> None:
    """Serve a checkpoint to OpenAI clients, with quality per request, metrics and a web page.

    Example: moe-prism serve olmoe-elastic --port 8000
    """
    from ..errors import PrismError

    try:
        from ..serving.app import ServerLimits, create_app
        from ..serving.run import bind, run
    except ModuleNotFoundError as error:
        raise PrismError(f"the server needs {error.name}, which is missing: pip install 'moe-prism[serve]'") from None
    limits = ServerLimits(api_key, max_waiting, max_body, drain_seconds)
    with bind(host, port) as socket:
        from ..serving.load import EngineOptions, check, load
        from .console import bytes_of, compute_dtype, err, load_tokenizer, quiet

        limit = None if memory is None else bytes_of(memory)
        options = EngineOptions(policy, max_running, memory_tokens, max_prefill, k_min, hopeless, limit)
        check(checkpoint, options)
        quiet()
        tokenizer = load_tokenizer(str(checkpoint))
        called = name or checkpoint.resolve().name
        kind = compute_dtype(dtype) if limit is None else dtype
        model, engine = load(checkpoint, tokenizer, called, options, dtype=kind, verify=verify)
        address, taken = socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        run(
            create_app(model, engine, limits),
            socket,
            drain_seconds,
            ready=lambda: err.print(f"serving {called} at http://{shown}:{taken}", highlight=False, soft_wrap=True),
        )
