"""The model card of a trained reference model: its words, its table, its training curve and the thinned log.

Knows nothing of weights; everything it states is in ``Facts``.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .loop import TrainConfig
from .model import ModelConfig

Scores = dict[str, dict[str, Any]]  # text name -> {tokens, nll, ppl, bits_per_byte}


@dataclass(frozen=True)
class Facts:
    """What the card says. ``log`` holds the records of ``log.jsonl`` up to ``step``; ``data`` is ``data.json``."""

    name: str
    config: ModelConfig
    training: TrainConfig
    parameters: int
    step: int
    log: list[dict[str, Any]]
    data: dict[str, Any]
    data_note: str
    command: str
    logit_difference: float
    scores: Scores
    compared: str | None
    compared_scores: Scores


def read_log(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Records up to ``last_step``, one per step, in order.

    A run that was killed repeats the steps since its last checkpoint, and its last line may be cut off.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= last_step:
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def thin(records: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """At most ``rows`` records, evenly spread; the last is always among them."""
    stride = max(1, -(-len(records) // rows))
    return records[::-1][::stride][::-1]


def save_curve(path: Path, log: list[dict[str, Any]]) -> None:
    """Draw training loss (nats per token) over tokens: the logged batches and the mean of each with its neighbours."""
    figure = Figure(figsize=(7, 3.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    tokens = [record["tokens"] / 1e6 for record in log]
    losses = [record["loss"] for record in log]
    half = len(losses) // 50
    windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    axes.plot(tokens, losses, color="#b8c4d6", linewidth=0.8, label="one batch")
    axes.plot(tokens, smooth, color="#1f5fa8", linewidth=1.6, label="mean of neighbours")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def model_card(facts: Facts) -> str:
    """README.md with the front matter that model hubs read."""
    c, t, data = facts.config, facts.training, facts.data
    per_step = t.step_tokens // t.context * t.context
    tokens = facts.step * per_step
    active = facts.parameters - c.layers * (c.experts - c.top_k) * 3 * c.neurons * c.hidden_size
    clock = [0, *(record["seconds"] for record in facts.log), 0]  # it starts anew with every --init-from
    seconds = sum(now for now, after in itertools.pairwise(clock) if after < now)
    texts = "\n".join(
        f"- `{name}`, SHA-256 `{digest}`" for name, digest in zip(data["names"], data["sha256"], strict=True)
    )
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [olmoe, moe]
---
# {facts.name}

A small Mixture-of-Experts language model in the OLMoE architecture, trained from scratch. It exists to
develop and demonstrate methods on real routing and real neurons; it is no assistant and knows few facts.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{facts.name}")
tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
```

## Architecture

| | |
|---|---|
| parameters | {facts.parameters / 1e6:.2f} M, {active / 1e6:.2f} M of them active per token |
| layers, hidden size, heads | {c.layers}, {c.hidden_size}, {c.heads} |
| experts per layer, neurons per expert | {c.experts}, {c.neurons} |
| experts per token | top-{c.top_k}, `norm_topk_prob={str(c.norm_topk_prob).lower()}` |
| vocabulary | {c.vocab_size:,} tokens, byte-level BPE, tied embeddings |
| stored as | bfloat16 safetensors |

## Quality

Weights as stored (bfloat16), arithmetic in fp32, windows of 256 predicted tokens without overlap, the first 300 KB
of each text. Perplexity depends on the tokenizer; bits per byte do not.

{_score_table(facts)}
## Training

![training loss over tokens](training_curve.png)

- {tokens:,} tokens ({facts.step:,} steps of {per_step:,}), {tokens / data["tokens"]:.2f} epochs of
  {data["tokens"]:,} tokens ({data["bytes"]:,} bytes of text).
- {seconds:,} seconds of training. Exported on {_machine()}.
- AdamW, learning rate {t.learning_rate:g} after {t.warmup_steps} warm-up steps, linear to zero over the last
  {t.decay_share:.0%} of the budget, weight decay {t.weight_decay:g}; load-balancing loss {t.balance_loss:g},
  router z-loss {t.z_loss:g}; context {t.context}; seed {t.seed}.
- Largest difference of a logit between the training code and transformers in fp32: {facts.logit_difference:.1e}.
- `training_log.jsonl` holds the log, thinned.

```
{facts.command}
```

## Data

{facts.data_note}

{texts}

The tokenizer was trained on the same text.
"""


def _score_table(facts: Facts) -> str:
    if not facts.scores:
        return "No held-out text was measured.\n"
    other = f" {facts.compared}: perplexity | bits per byte |" if facts.compared else ""
    lines = [f"| text | perplexity per token | bits per byte |{other}", "|---|---|---|" + "---|---|" * bool(other)]
    for name, score in facts.scores.items():
        row = f"| {name} | {score['ppl']:.2f} | {score['bits_per_byte']:.4f} |"
        if other:
            compared = facts.compared_scores[name]
            row += f" {compared['ppl']:.2f} | {compared['bits_per_byte']:.4f} |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return f"{os.cpu_count()} cores of {cpu}, torch {version('torch')}, transformers {version('transformers')}"
