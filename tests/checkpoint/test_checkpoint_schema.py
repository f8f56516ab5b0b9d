from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from checkpoint_samples import baseline_point, elastic_config, elastic_point, measured
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_prism.checkpoint.schema import (
    DistinctStable,
    OperatingPoints,
    parse_elastic_config,
    parse_operating_points,
)
from moe_prism.errors import CheckpointError

unit = st.floats(0, 1)
words = st.text(min_size=1, max_size=8)


@st.composite
def operating_points(draw: st.DrawFn) -> OperatingPoints:
    n, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    full = n * top_k

    def quality() -> dict[str, object]:
        nll = draw(st.floats(0, 20))
        return {
            "nll": nll,
            "ppl": math.exp(nll),
            "kl": draw(unit),
            "top1_agreement": draw(unit),
            "distinct": draw(st.booleans()),
            "stable": draw(st.none() | st.booleans()),
        }

    def series() -> list[object]:
        budgets = sorted(draw(st.sets(st.integers(1, full), min_size=1)))
        cost = {"flops_share": draw(unit), "bytes_share": draw(unit), "stderr": draw(st.none() | unit)}
        return [elastic_point(k, full, **quality(), **cost) for k in budgets]

    elastic = series()
    baseline = [baseline_point(k, top_k, **quality()) for k in sorted(draw(st.sets(st.integers(1, top_k))))]
    count = sum(p.distinct and p.stable is True for p in elastic)
    return measured(
        full_budget=full,
        text=draw(words),
        tokens=draw(st.integers(1)),
        seed=draw(st.integers()),
        second_text=draw(st.none() | words),
        second_seed=draw(st.none() | st.integers()),
        versions=draw(st.dictionaries(words, words, max_size=3)),
        machine=draw(st.dictionaries(words, words | st.integers() | st.floats(-1e9, 1e9), max_size=3)),
        elastic=elastic,
        baseline=baseline,
        distinct_stable=DistinctStable(elastic=draw(st.sampled_from([None, count]))),
        full_budget_max_logit_diff=draw(st.none() | unit),
        paper_gates={"proxy": series()} if draw(st.booleans()) else {},
    )


@given(operating_points())
def test_operating_points_survive_json(points: OperatingPoints) -> None:
    assert parse_operating_points(points.to_json()) == points


def test_operating_points_have_the_promised_names() -> None:
    value = json.loads(measured().to_json())
    assert {"full_budget", "text", "seed", "elastic", "baseline", "distinct_stable", "full_budget_max_logit_diff"} <= (
        value.keys()
    )
    assert {"k_active", "share", "nll", "ppl", "kl", "top1_agreement"} <= value["elastic"][0].keys()
    assert {"k", "share", "nll", "ppl", "kl", "top1_agreement"} <= value["baseline"][0].keys()
    assert value["distinct_stable"].keys() == {"elastic", "baseline"}


@given(
    n=st.integers(1, 8),
    size=st.integers(1, 8),
    top_k=st.integers(1, 8),
    options=st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3),
)
def test_elastic_config_survives_json(n: int, size: int, top_k: int, options: dict[str, object]) -> None:
    config = elastic_config(
        num_sub_experts=n, num_neurons=n * size, num_experts=8, top_k=top_k, full_budget=n * top_k, gate_options=options
    )
    assert parse_elastic_config(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sub_experts": 3, "full_budget": 6}, "3 does not divide num_neurons 8"),
        ({"full_budget": 9}, r"full_budget 9 is not top_k \* num_sub_experts = 8"),
        ({"top_k": 5, "full_budget": 20}, "top_k 5 is more than num_experts 4"),
        ({"layers": ["a", "a"]}, "twice"),
        ({"layers": []}, "layers"),
        ({"num_neurons": "many"}, "num_neurons"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_impossible_config_is_named(change: dict[str, object], message: str) -> None:
    value = {**elastic_config().model_dump(), **change}
    with pytest.raises(CheckpointError, match=message):
        parse_elastic_config(value)


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        elastic_config().seed = 3


def test_future_version_wins_over_its_unknown_fields() -> None:
    message = "written by schema version 7, this moe-prism reads up to 1; upgrade moe-prism"
    with pytest.raises(CheckpointError, match=message):
        parse_elastic_config({"version": 7, "unheard_of": True})
    with pytest.raises(CheckpointError, match=message):
        parse_operating_points('{"version": 7, "unheard_of": true}')


@pytest.mark.parametrize("value", [None, [], "1", {}, {"version": "one"}, {"version": 0}])
def test_what_is_no_config_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"must be an object|no schema version"):
        parse_elastic_config(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elastic": [elastic_point(2, 8), elastic_point(1, 8)]}, "must ascend"),
        ({"elastic": [elastic_point(2, 8), elastic_point(2, 8)]}, "must ascend"),
        ({"elastic": [elastic_point(9, 9)]}, "9 is not in 1..8"),
        ({"elastic": [elastic_point(2, 4)]}, "share 0.5 of 2 is not 2/8"),
        ({"elastic": []}, "elastic"),
        ({"baseline": [baseline_point(2, 2), baseline_point(1, 2)]}, "must ascend"),
        ({"baseline": [baseline_point(1, 3)]}, "top_k 3, which does not divide 8"),
        ({"baseline": [baseline_point(1, 4), baseline_point(2, 2)]}, "baseline: share"),
        ({"paper_gates": {"proxy": [elastic_point(9, 9)]}}, "proxy: k_active 9"),
        ({"distinct_stable": DistinctStable(elastic=5)}, "distinct_stable.elastic is 5, but 8 points"),
        ({"distinct_stable": DistinctStable(baseline=1)}, "distinct_stable.baseline is 1, but 0 points"),
        ({"full_budget_max_logit_diff": math.nan}, "finite"),
    ],
)
def test_inconsistent_points_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        measured(**change)


@pytest.mark.parametrize(
    "change", [{"ppl": 100.0}, {"nll": math.inf}, {"kl": -0.1}, {"top1_agreement": 1.1}, {"stderr": -1.0}]
)
def test_impossible_quality_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        elastic_point(4, 8, **change)


def test_json_errors_name_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"operating_points.json is not valid JSON"):
        parse_operating_points(b'{"full_budget": 8,')


def test_import_is_light() -> None:
    code = (
        "import sys, moe_prism.checkpoint.schema, moe_prism.checkpoint\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": [(1, 1, 0)] * 6}, "has 6 rungs, needed is one for every budget below full: 7"),
        ({"ladder": [(1, 3, 0)] * 7}, "of budget 1 is impossible"),  # a sub-expert has two neurons
        ({"ladder": [(1, 2, 3)] * 7}, "of budget 1 is impossible"),
        ({"ladder": [(8, 16, 0)] * 7}, "reads more than budget 1 pays for"),
        ({"ladder": [(1, 1, 0)] * 7, "scan": list(range(1, 9))}, "two ways to spend a budget"),
        ({"recalibration": "median"}, "recalibration"),
        ({"neuron_block": 2}, "neuron_block 2 needs scan"),
        ({"neuron_block": 3, "scan": list(range(1, 9))}, "sub-experts of 2 neurons that it divides"),
        ({"scan": [3, *range(2, 9)]}, "scan of budget 1 must be from 1 to 2, got 3"),
        ({"scan": [2, *range(2, 9)], "neuron_block": 2}, "scan of budget 1 must be from 1 to 1, got 2"),
    ],
)
def test_impossible_plans_and_recalibrations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elastic_config(**changes)


def test_checkpoints_from_before_blocks_choose_single_neurons() -> None:
    blocks = elastic_config(scan=[1, 4, *range(3, 9)], neuron_block=2)
    assert parse_elastic_config(json.loads(blocks.to_json())) == blocks
    before = json.loads(elastic_config(scan=[2, *range(2, 9)]).to_json())
    del before["neuron_block"]
    assert parse_elastic_config(before).neuron_block == 1


def test_a_ladder_survives_json() -> None:
    elastic = elastic_config(ladder=[(1, 2, 1)] * 7, recalibration="scale", compensated=[3])
    assert parse_elastic_config(json.loads(elastic.to_json())) == elastic


def test_budgets_of_layers_and_tokens_are_checked() -> None:
    table = [[1, 1], [1, 3], [3, 3], [3, 5], [4, 6], [5, 7], [6, 8], [8, 8]]
    config = elastic_config(layer_budgets=table, sharing=[0.5] * 8)
    assert parse_elastic_config(json.loads(config.to_json())) == config
    above, falls, short_of_full = list(table), list(table), list(table)
    above[3] = [4, 5]
    falls[4] = [2, 8]
    short_of_full[7] = [7, 8]
    for bad, message in ((above, "mean"), (falls, "from"), (short_of_full, "full budget"), (table[1:], "8 rows")):
        with pytest.raises(ValidationError, match=message):
            elastic_config(layer_budgets=bad)
    for wrong in ([0.5] * 7, [1.5] * 8):
        with pytest.raises(ValidationError, match="sharing"):
            elastic_config(sharing=wrong)
