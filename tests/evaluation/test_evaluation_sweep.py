"""A whole sweep of tiny models, against the original model and against what the gates must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import make_elastic
from tiny import tiny_model, tokens
from transformers import PreTrainedModel

from moe_prism import elastic
from moe_prism.errors import PrismError
from moe_prism.evaluation.measure import Run, max_logit_difference, measure
from moe_prism.evaluation.sweep import SweepResult, sweep
from moe_prism.evaluation.text import windows

CONTEXT = 16
TOKENS = 160


def letters(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    return {"input_ids": [3 + ord(c) % 90 for c in text]}


def elastic_model(gate: str, seed: int = 0, calibration: int = 0) -> PreTrainedModel:
    model = tiny_model("olmoe", seed)
    make_elastic(model, tokens(8, 32, seed=calibration), sub_experts=4, gate=gate)
    return model


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("one.txt", 1), ("two.txt", 2)):
        letters = np.random.default_rng(seed).integers(97, 123, 400)
        (folder / name).write_text("".join(map(chr, letters)), encoding="utf-8")
    return folder / "one.txt", folder / "two.txt"


def windows_of(text: Path) -> torch.Tensor:
    return windows(letters(text.read_text())["input_ids"][: TOKENS + 1], CONTEXT)


def small_sweep(model: PreTrainedModel, text: Path, **options: Any) -> SweepResult:
    return sweep(model, letters, text, seed=0, tokens=TOKENS + 1, context=CONTEXT, batch_size=4, **options)


def test_ends_of_both_series_are_the_original(texts: tuple[Path, Path]) -> None:
    model, original = elastic_model("static"), tiny_model("olmoe")
    result = small_sweep(model, texts[0], reference=original)
    alone = measure(
        original, windows(letters(texts[0].read_text())["input_ids"][: TOKENS + 1], CONTEXT), [Run("x", None)]
    )
    assert sorted(result.elastic.results) == list(range(1, 17))
    assert sorted(result.baseline) == [1, 2, 3, 4]
    for end in (result.elastic.results[16], result.baseline[4]):
        np.testing.assert_allclose(end.nll, alone["x"].nll, rtol=1e-4, atol=1e-5)
        assert (end.kl, end.top1_agreement) == (0, 1)
    assert result.points.tokens == TOKENS
    assert result.points.full_budget_max_logit_diff is not None
    assert result.points.full_budget_max_logit_diff <= 1e-4
    assert result.points.elastic[7].flops_share == elastic.cost_shares(model, 8).flops
    assert result.points.elastic[0].kl > result.points.elastic[14].kl > 0


def test_the_linear_gate_at_multiples_of_n_is_the_baseline(texts: tuple[Path, Path]) -> None:
    """arXiv 2510.19366, phase 1.3: without finetuning it reproduces top-k' at K = N k'."""
    result = small_sweep(elastic_model("linear"), texts[0], budgets=[4, 8, 12])
    for k in (1, 2, 3):
        ours, baseline = result.elastic.results[4 * k], result.baseline[k]
        np.testing.assert_allclose(ours.nll, baseline.nll, rtol=1e-3, atol=1e-4)
        assert ours.kl == pytest.approx(baseline.kl, rel=1e-3)
    assert result.baseline[1].kl > 2 * result.baseline[3].kl  # or the comparison would say nothing


def test_baseline_is_the_original_configured_with_fewer_experts(texts: tuple[Path, Path]) -> None:
    result = small_sweep(elastic_model("static"), texts[0], budgets=[8])
    fewer = tiny_model("olmoe", num_experts_per_tok=2)
    np.testing.assert_allclose(
        result.baseline[2].nll, measure(fewer, windows_of(texts[0]), [Run("x", None)])["x"].nll, rtol=1e-4, atol=1e-5
    )


def test_second_text_second_seed_and_models_beside(texts: tuple[Path, Path]) -> None:
    model, again, proxy = elastic_model("static"), elastic_model("static", calibration=9), elastic_model("proxy")
    stages: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"budgets": [2, 8, 16]}
    result = small_sweep(
        model,
        texts[0],
        second_text=texts[1],
        second_model=again,
        second_seed=9,
        beside={"proxy": proxy},
        progress=lambda *told: stages.append(told),
        **options,
    )
    points = result.points
    assert points.text.endswith("/one.txt")
    assert str(points.second_text).endswith("/two.txt")
    assert points.second_seed == 9
    assert all(point.stable is not None for point in (*points.elastic, *points.baseline))
    assert points.distinct_stable.elastic == sum(p.distinct and p.stable is True for p in points.elastic)
    # each part equals a sweep of its own
    on_second = small_sweep(model, texts[1], **options)
    of_again, of_proxy = small_sweep(again, texts[0], **options), small_sweep(proxy, texts[0], **options)
    assert result.further.elastic_text is not None
    assert result.further.elastic_seed is not None
    for k in (2, 8, 16):
        for ours, theirs in (
            (result.further.elastic_text[k], on_second.elastic.results[k]),
            (result.further.elastic_seed[k], of_again.elastic.results[k]),
            (result.beside["proxy"].results[k], of_proxy.elastic.results[k]),
        ):
            np.testing.assert_allclose(ours.nll, theirs.nll, rtol=1e-4, atol=1e-5)
    assert points.paper_gates["proxy"][1].flops_share > points.elastic[1].flops_share  # scoring is not free
    # 10 windows are 3 batches: the full model, 2 budgets of 3 models, 3 baselines; then 2 budgets and 3 baselines
    assert [s for s in stages if s[1] == s[2]] == [(points.text, 30, 30), (points.second_text, 18, 18)]


def test_the_dial_is_put_back(texts: tuple[Path, Path]) -> None:
    model = elastic_model("static")
    ids = tokens()
    elastic.set_budget(model, 3)
    before = model(ids).logits
    small_sweep(model, texts[0], budgets=[1, 16])
    assert torch.equal(model(ids).logits, before)


def test_an_altered_original_shows(texts: tuple[Path, Path]) -> None:
    model, other = elastic_model("static"), tiny_model("olmoe", seed=5)
    found = small_sweep(model, texts[0], budgets=[1], reference=other).points.full_budget_max_logit_diff
    assert found is not None
    assert 1 < found <= max_logit_difference(model, other, windows_of(texts[0])) * (1 + 1e-5)


def test_a_router_that_cannot_take_fewer_experts_is_left_out(texts: tuple[Path, Path]) -> None:
    model = tiny_model("phimoe")
    make_elastic(model, tokens(8, 32), sub_experts=4)
    assert sorted(small_sweep(model, texts[0], budgets=[1, 8]).baseline) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0]}, r"budget 0 is not in 1\.\.16"),
        ({"budgets": [4, 17]}, r"budget 17 is not in 1\.\.16"),
        ({"budgets": [4, 4]}, "repeat"),
        ({"budgets": []}, "no budgets"),
        ({"second_seed": 1}, "go together"),
        ({"second_text": "nowhere.txt"}, r"nowhere\.txt.*does not exist"),
        ({"context": 4000}, r"one\.txt: the text has 161 tokens.*needs 4001"),
    ],
)
def test_bad_input_is_refused_before_any_work(texts: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    model = elastic_model("static")
    ran: list[int] = []
    model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(PrismError, match=message):
        sweep(model, letters, texts[0], seed=0, **{"tokens": TOKENS + 1, "context": CONTEXT, **options})
    assert not ran


def test_a_coarser_model_beside_has_its_points_in_the_models_units(texts: tuple[Path, Path]) -> None:
    coarse = tiny_model("olmoe")
    make_elastic(coarse, tokens(8, 32), sub_experts=2)
    beside = small_sweep(elastic_model("static"), texts[0], budgets=[3, 4, 8, 16], beside={"coarse": coarse})
    alone = small_sweep(coarse, texts[0], budgets=[2, 4, 8])
    found = beside.points.paper_gates["coarse"]
    assert [point.k_active for point in found] == [4, 8, 16]
    assert [point.share for point in found] == [point.share for point in alone.points.elastic]
    assert [point.flops_share for point in found] == [point.flops_share for point in alone.points.elastic]
    for point, same in zip(found, alone.points.elastic, strict=True):
        assert point.nll == pytest.approx(same.nll, rel=1e-5)


def test_models_of_other_granularity_do_not_mix(texts: tuple[Path, Path]) -> None:
    coarse = tiny_model("olmoe")
    make_elastic(coarse, tokens(8, 32), sub_experts=2)
    with pytest.raises(PrismError, match="fine has full budget 16, which does not divide the model's 8"):
        small_sweep(coarse, texts[0], beside={"fine": elastic_model("static")})
    with pytest.raises(PrismError, match="second_model has full budget 8, the model has 16"):
        small_sweep(elastic_model("static"), texts[0], second_model=coarse, second_seed=1)


def test_a_stock_model_is_refused(texts: tuple[Path, Path]) -> None:
    with pytest.raises(PrismError):
        small_sweep(tiny_model("olmoe"), texts[0])
