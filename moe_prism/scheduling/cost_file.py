"""The cost model of an elastic checkpoint: ``moe_prism/cost_model.json``, and the same record as a file of its own.

Knows nothing of how the numbers came about.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import replace_file
from ..checkpoint.read import ElasticCheckpoint, open_checkpoint
from ..checkpoint.schema import COST_MODEL_FILE
from ..checkpoint.write import update_checkpoint
from ..errors import PrismError
from .cost_model import CostModel
from .step_load import TERMS, MeasuredStep, StepLoad

VERSION = 2


def save_cost_model(checkpoint: ElasticCheckpoint, model: CostModel) -> None:
    """Make it part of the checkpoint, checksums included.

    Raises:
        PrismError: it was measured on other weights.
    """
    _check(model, checkpoint)
    update_checkpoint(checkpoint.path, {COST_MODEL_FILE: _encode(model)})


def load_cost_model(checkpoint: ElasticCheckpoint, *, engine: str, machine: str) -> CostModel:
    """The checkpoint's cost model.

    Raises:
        PrismError: there is none, it is damaged, or it was measured on another engine or machine, or on other weights.
    """
    content = checkpoint.cost_model()
    if content is None:
        raise PrismError(f"{checkpoint.path} has no cost model; measure one with `moe-prism profile-cost`")
    model = _decode(content, str(checkpoint.path / COST_MODEL_FILE))
    model.require(engine=engine, machine=machine, checkpoint=checkpoint.fingerprint())
    return model


def read_cost_model(path: Path) -> CostModel:
    """The cost model in a JSON file, or in a checkpoint, wherever it was measured: to simulate, not to serve.

    Raises:
        PrismError: there is none, or it is damaged, or of other weights than the checkpoint's.
    """
    if path.is_dir():
        checkpoint = open_checkpoint(path, verify=False)
        content = checkpoint.cost_model()
        if content is None:
            raise PrismError(f"{path} has no cost model; measure one with `moe-prism profile-cost`, or name a file")
        model = _decode(content, str(path / COST_MODEL_FILE))
        _check(model, checkpoint)
        return model
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise PrismError(f"cost model {path} cannot be read: {error}") from None


def write_cost_model(path: Path, model: CostModel) -> None:
    """A JSON file of its own, replaced in one step."""
    replace_file(path, _encode(model))


def to_record(model: CostModel) -> dict[str, Any]:
    """A cost model as plain JSON values."""
    record = {f.name: getattr(model, f.name) for f in fields(model) if f.init}
    record["coefficients"] = dict(zip(TERMS, model.coefficients, strict=True))
    steps = [{**m.load._asdict(), "seconds": m.seconds, "held_out": m.held_out} for m in model.measured]
    return {"version": VERSION, **record, "measured": steps}


def from_record(value: Any) -> CostModel:
    """The inverse; raises PrismError for another version or a damaged record."""
    if not isinstance(value, dict) or value.get("version") != VERSION:
        got = value.get("version") if isinstance(value, dict) else type(value).__name__
        raise PrismError(f"cost model version must be {VERSION}, got {got!r}; run `moe-prism profile-cost` again")
    record = {name: item for name, item in value.items() if name != "version"}
    try:
        if set(record["coefficients"]) != set(TERMS):
            raise KeyError(f"its terms are {', '.join(record['coefficients'])}")
        record["coefficients"] = tuple(float(record["coefficients"][name]) for name in TERMS)
        record["measured"] = tuple(_step(dict(step)) for step in record["measured"])
        return CostModel(**record)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PrismError):
            raise
        raise PrismError(f"the cost model is damaged ({error}); run `moe-prism profile-cost` again") from None


def _step(record: dict[str, Any]) -> MeasuredStep:
    seconds, held_out = float(record.pop("seconds")), bool(record.pop("held_out"))
    return MeasuredStep(StepLoad(**{name: float(value) for name, value in record.items()}), seconds, held_out)


def _check(model: CostModel, checkpoint: ElasticCheckpoint) -> None:
    model.require(engine=model.engine, machine=model.machine, checkpoint=checkpoint.fingerprint())


def _encode(model: CostModel) -> bytes:
    return (json.dumps(to_record(model), indent=1) + "\n").encode()


def _decode(content: bytes, name: str) -> CostModel:
    try:
        return from_record(json.loads(content))
    except PrismError as error:
        raise PrismError(f"{name}: {error}") from None
    except ValueError as error:
        raise PrismError(f"{name} is not valid JSON ({error}); measure again with `moe-prism profile-cost`") from None
