"""What ``simulate`` and ``bench schedule`` share: a scenario from options as they are typed, and its record shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import out

if TYPE_CHECKING:
    from ..bench.scenario import Scenario
    from ..scheduling import CostModel


def scenario_of(*, policies: str, loads: str, floors: str, **options: Any) -> Scenario:
    """A scenario from text where an option is a list; the others are its fields.

    Raises:
        PrismError: text that is no such list.
    """
    from ..bench.scenario import Scenario

    return Scenario(
        policies=[name.strip() for name in policies.split(",") if name.strip()],
        loads=parse_numbers("--loads", loads),
        floors=parse_mix(floors),
        **options,
    )


def parse_numbers(option: str, text: str) -> dict[str, float]:
    """``"low=0.3,high=1.5"`` -> names and numbers; raises PrismError for anything else."""
    from ..errors import PrismError

    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise PrismError(f"{option} must be names and numbers such as low=0.3,high=1.5; got {text!r}") from None
    return found


def parse_mix(text: str) -> tuple[list[float], list[float]]:
    """``"0.25=0.4,1=0.6"`` -> floors and their weights; raises PrismError for anything else."""
    from ..errors import PrismError

    try:
        pairs = {float(floor): weight for floor, weight in parse_numbers("--floors", text).items()}
    except ValueError:
        raise PrismError(f"--floors must be shares with weights such as 0.25=0.4,1=0.6; got {text!r}") from None
    return list(pairs), list(pairs.values())


def show(record: Mapping[str, Any], cost: CostModel, json_file: Path | None, plots: Path | None) -> None:
    """Print the tables; write the record and the pictures where they are wanted."""
    from ..bench.tables import load_tables

    for table in load_tables(record):
        out.print(table)
    if json_file:
        from ..bench.results import write_results

        write_results(json_file, record)
    if plots:
        from ..bench.plots import write_plots

        write_plots(plots, record, cost)
