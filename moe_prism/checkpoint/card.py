"""The model card (README.md) of an elastic checkpoint, from what was measured.

Knows nothing of files: the caller writes the text.
"""

from __future__ import annotations

import yaml

from .schema import PLOT_FILE, ElasticConfig, OperatingPoints


def model_card(
    *,
    name: str,
    elastic: ElasticConfig,
    recipe_yaml: str,
    operating_points: OperatingPoints | None = None,
    base_model: str | None = None,
    has_plot: bool = False,
) -> str:
    """README.md in the Hugging Face format: YAML front matter, then Markdown.

    Args:
        name: title, for instance the directory's name.
        elastic: what config.json says.
        recipe_yaml: the recipe that made the checkpoint.
        operating_points: measured points; without them the card says how to measure.
        base_model: hub id of the original ("allenai/OLMoE-1B-7B-0924"); None when it has none.
        has_plot: whether moe_prism/frontier.png is part of the checkpoint.
    """
    parts = [
        _front_matter(base_model),
        f"# {name}\n",
        _summary(elastic, base_model),
        _usage(elastic),
        _quality(elastic, operating_points, has_plot),
        f"## Recipe\n\n```yaml\n{recipe_yaml.strip()}\n```\n",
        _provenance(elastic, operating_points),
    ]
    return "\n".join(parts)


def _front_matter(base_model: str | None) -> str:
    fields: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe-prism", "elastic"],
    }
    if base_model:
        fields["base_model"] = base_model
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _summary(elastic: ElasticConfig, base_model: str | None) -> str:
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a Mixture-of-Experts model"
    size = elastic.num_neurons // elastic.num_sub_experts
    return (
        f"An elastic form of {origin}, made by moe-prism without retraining. Each of the {elastic.num_experts} routed "
        f"experts of {len(elastic.layers)} layers is split into {elastic.num_sub_experts} sub-experts of {size} "
        f"neurons. A token may run 1 to {elastic.full_budget} of them per layer (its budget); at "
        f"{elastic.full_budget} the model computes what the original computes.\n\n"
        "The weights are the original's with the neurons inside each expert reordered, which does not change the "
        "function: any engine that loads the original loads this directory as the original. The licence and the "
        "limits of the original apply; below full budget its quality falls as the table shows.\n"
    )


def _usage(elastic: ElasticConfig) -> str:
    budget = max(1, elastic.full_budget // 2)
    return f"""## Use at a budget

```python
import moe_prism
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", experts_implementation="moe_prism")
moe_prism.set_budget(model, {budget})  # 1..{elastic.full_budget}
```

```sh
moe-prism generate DIR --prompt "Once upon a time" --k-active {budget}
moe-prism restore DIR OUT  # the original weights, bit for bit
sha256sum -c SHA256SUMS    # inside DIR
```
"""


def _quality(elastic: ElasticConfig, points: OperatingPoints | None, has_plot: bool) -> str:
    lines = ["## Operating points", ""]
    if points is None:
        return "\n".join([*lines, "Not measured yet: `moe-prism sweep DIR --text FILE`.", ""])
    if has_plot:
        lines += [f"![Loss against the share of routed-expert work]({PLOT_FILE})", ""]
    lines += [
        f"Measured on {points.text} ({points.tokens:,} tokens). Loss and KL (to the full model) in nats per token; "
        "FLOPs and bytes are those of the routed experts including the gate, as a share of the original's. "
        "*Distinct*: the mean loss differs from the neighbours' by more than two paired standard errors. *Stable*: "
        "that order holds on a second text and with a second calibration seed.",
        "",
        "| budget | share | perplexity | loss | KL | top-1 agreement | FLOPs | bytes | distinct | stable |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|:---:|:---:|",
    ]
    for p in points.elastic:
        lines.append(
            f"| {p.k_active} | {p.share:.1%} | {p.ppl:.3f} | {p.nll:.4f} | {p.kl:.4f} | {p.top1_agreement:.1%} | "
            f"{p.flops_share:.1%} | {p.bytes_share:.1%} | {_mark(p.distinct)} | {_mark(p.stable)} |"
        )
    if points.baseline:
        lines += [
            "",
            "For comparison, the original model with fewer whole experts per token:",
            "",
            "| experts | share | perplexity | loss | KL | top-1 agreement | distinct | stable |",
            "|---:|---:|---:|---:|---:|---:|:---:|:---:|",
        ]
    for b in points.baseline:
        lines.append(
            f"| {b.k} | {b.share:.1%} | {b.ppl:.3f} | {b.nll:.4f} | {b.kl:.4f} | {b.top1_agreement:.1%} | "
            f"{_mark(b.distinct)} | {_mark(b.stable)} |"
        )
    counts = points.distinct_stable
    if counts.elastic is not None and counts.baseline is not None:
        lines += ["", f"Distinct and stable points: {counts.elastic} elastic, {counts.baseline} of the original."]
    if points.full_budget_max_logit_diff is not None:
        lines += [
            "",
            f"At budget {elastic.full_budget} the logits differ from the original's by at most "
            f"{points.full_budget_max_logit_diff:.2g}.",
        ]
    return "\n".join([*lines, ""])


def _provenance(elastic: ElasticConfig, points: OperatingPoints | None) -> str:
    lines = [
        "## Provenance",
        "",
        f"- gate: `{elastic.gate}`; solver: `{elastic.solver}`; seed: {elastic.seed}",
        f"- calibration: {elastic.calibration.text} ({elastic.calibration.tokens:,} tokens)",
        f"- weights: {elastic.weights_dtype}; checkpoint schema version {elastic.version}",
    ]
    if elastic.created_with:
        lines.append(f"- made with {_pairs(elastic.created_with)}")
    if points is not None:
        lines.append(f"- measured with {_pairs(points.versions)} on {_pairs(points.machine)}")
    lines.append("- method: after MoE-Prism, [arXiv 2510.19366](https://arxiv.org/abs/2510.19366)")
    return "\n".join([*lines, ""])


def _pairs(values: dict[str, str] | dict[str, str | int | float]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _mark(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"
