"""Train the small OLMoE-architecture reference model that the package bundles.

    python tools/train_reference.py TEXT [TEXT ...] --workdir DIR --out models/reference

Stops after --tokens or --minutes, whichever comes first; the same command continues a run that was
killed. Weights are kept at 10, 30 and 100 % of the tokens; --export-only 010 turns one of them, or the
present state, into a Hugging Face model without training, also while the training goes on. Every file
in --workdir can be deleted afterwards.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import torch
from reference_training.data import prepare
from reference_training.loop import TrainConfig, run
from reference_training.model import ModelConfig
from torch import multiprocessing

EXPORTABLE = {"010": "weights-010.pt", "030": "weights-030.pt", "100": "weights-100.pt", "state": "state.pt"}


def build_parser() -> argparse.ArgumentParser:
    """Command line; the defaults are the bundled model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="plain or .xz text files")
    parser.add_argument("--workdir", type=Path, required=True, help="tokens, logs and checkpoints")
    parser.add_argument("--out", type=Path, help="write the Hugging Face model here at the end")
    parser.add_argument("--eval", nargs="*", type=Path, default=[], help="held-out texts for the model card")
    parser.add_argument("--compare", type=Path, help="another model directory, measured beside for the model card")
    parser.add_argument("--data-note", default="", help="origin and licence of the texts, for the model card")
    parser.add_argument("--export-only", choices=sorted(EXPORTABLE), help="write --out from these weights; no training")
    parser.add_argument(
        "--init-from",
        type=Path,
        help="go on from a model that this script exported, when its --workdir is gone; --tokens counts from step 0",
    )
    parser.add_argument("--tokens", type=int, default=30_000_000)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--decay-share", type=float, default=0.3, help="last share of the budget, linear to zero")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance-loss", type=float, default=0.01)
    parser.add_argument("--z-loss", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes on a CPU; default: one per core")
    parser.add_argument("--compile", action="store_true", help="fuse element-wise parts with torch.compile")
    for field in fields(ModelConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = {"int": int, "float": float}[str(field.type)]
            parser.add_argument(flag, type=kind, default=field.default)
    return parser


def reproducing_command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The training command for the model card: every setting that is not the default, files relative to the project."""
    root = Path(__file__).resolve().parents[1]
    words = ["python", "tools/train_reference.py", *(os.path.relpath(p, root) for p in args.text)]
    here_only = {"text", "workdir", "out", "eval", "compare", "data_note", "export_only", "workers"}
    for name, value in vars(args).items():
        if name not in here_only and value != parser.get_default(name):
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    own = shlex.join([*words, "--workdir", "DIR", "--out", "DIR"])
    if args.init_from is None:
        return own
    card = args.init_from / "README.md"
    earlier = [line for line in card.read_text().splitlines() if line.startswith(words[0] + " " + words[1])]
    return "\n".join([*earlier, own.replace(str(args.init_from), "MODEL-OF-THE-LINE-ABOVE")])


def main(arguments: list[str]) -> None:
    """Train (unless only an export is asked for), then export."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    # checked now, not after hours of training
    missing = [str(p) for p in [*args.text, *args.eval] if not p.is_file()]
    if missing:
        raise SystemExit(f"no such text file: {', '.join(missing)}")
    if args.init_from and not (args.init_from / "config.json").is_file():
        raise SystemExit(f"--init-from {args.init_from} is not a model directory (no config.json)")
    if args.compare and not (args.compare / "config.json").is_file():
        raise SystemExit(f"--compare {args.compare} is not a model directory (no config.json)")
    if args.export_only and not args.out:
        raise SystemExit("--export-only needs --out, the directory to write")
    if args.step_tokens < args.context * (args.workers or 1) or args.step_tokens % args.context:
        raise SystemExit(
            f"--step-tokens must be a multiple of --context ({args.context}), with a window for every worker; "
            f"got {args.step_tokens}"
        )
    if not 0 < args.decay_share <= 1 or args.warmup_steps < 1:
        raise SystemExit("--decay-share must be in (0, 1] and --warmup-steps at least 1")
    if args.out:
        from reference_training.export import check_output

        check_output(args.out)
    model_config = ModelConfig(**{f.name: getattr(args, f.name) for f in fields(ModelConfig)})
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    if not args.export_only:
        train(args, model_config, config)
    if args.out:
        from reference_training.export import export

        export(
            args.workdir,
            args.workdir / EXPORTABLE[args.export_only or "100"],
            model_config,
            args.out,
            args.eval,
            training=config,
            command=reproducing_command(parser, args),
            data_note=args.data_note,
            compare=args.compare,
        )


def train(args: argparse.Namespace, model_config: ModelConfig, config: TrainConfig) -> None:
    """Prepare the text and train, on the GPU if there is one, else in one process per worker."""
    prepare(args.text, args.workdir, model_config.vocab_size, model_config.max_positions)
    if args.init_from and not (args.workdir / "state.pt").exists():
        from reference_training.export import write_start

        step = write_start(args.init_from, args.workdir, model_config)
        print(f"going on from {args.init_from} at step {step}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = 1 if device == "cuda" else args.workers or len(os.sched_getaffinity(0))
    (args.workdir / "rendezvous").unlink(missing_ok=True)
    job = (workers, args.workdir.resolve(), model_config, config, device)
    if workers == 1:
        run(0, *job)
    else:
        multiprocessing.spawn(run, args=job, nprocs=workers)


if __name__ == "__main__":
    main(sys.argv[1:])
