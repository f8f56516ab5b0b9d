from __future__ import annotations

import yaml
from checkpoint_samples import elastic_config, measured

from moe_prism.checkpoint.card import model_card


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", 2)
    value = yaml.safe_load(head)
    assert isinstance(value, dict)
    return value


def test_card_of_a_measured_checkpoint() -> None:
    points = measured()
    card = model_card(
        name="olmoe-elastic",
        elastic=elastic_config(),
        recipe_yaml="gate: static\nsolver: balanced\n",
        operating_points=points,
        base_model="allenai/OLMoE-1B-7B-0924",
        has_plot=True,
    )
    assert front_matter(card)["library_name"] == "transformers"
    assert front_matter(card)["base_model"] == "allenai/OLMoE-1B-7B-0924"
    assert "\n# olmoe-elastic\n" in card
    assert "](moe_prism/frontier.png)" in card
    assert "```yaml\ngate: static\nsolver: balanced\n```" in card
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row[0]) for row in rows] == [p.k_active for p in points.elastic] + [p.k for p in points.baseline]
    assert [float(row[2]) for row in rows[: len(points.elastic)]] == [round(p.ppl, 3) for p in points.elastic]
    assert [row[-1].strip() for row in rows] == ["yes"] * 8 + ["no"] * 2
    assert "8 elastic, 0 of the original" in card


def test_card_before_measuring() -> None:
    card = model_card(name="x", elastic=elastic_config(), recipe_yaml="gate: static\n")
    assert "base_model" not in front_matter(card)
    assert "moe-prism sweep" in card
    assert "frontier.png" not in card


def test_python_example_is_valid() -> None:
    card = model_card(name="x", elastic=elastic_config(), recipe_yaml="")
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'experts_implementation="moe_prism"' in code
    assert "moe_prism.set_budget(model, 4)" in code
