"""Whether llama.cpp computes an exported checkpoint as transformers does: its own converter, its own dial.

    moe-prism export ELASTIC build/fine --format fine-grained
    python tools/llama_export.py build/fine --llama-source LLAMA.CPP --llama-python LLAMA_ENV/bin/python

The checkpoint is converted by llama.cpp's ``convert_hf_to_gguf.py`` in fp32, then run by llama-cpp-python with
``expert_used_count`` overridden, and the log-probabilities after a prompt of random tokens are compared with those of
transformers with the same ``num_experts_per_tok``. Two things stand between the bundled model and llama.cpp, and are
done to a copy: its OLMoE wants an output layer that is not tied, and it knows tokenizers by their hash, so this one is
declared to be OLMo's (no text is tokenized here). Knows nothing of budgets: experts are experts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.evaluation.environment import versions

CONVERT = """
import runpy, sys
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "olmo"
sys.argv = ["convert_hf_to_gguf.py", sys.argv[1], "--outfile", sys.argv[2], "--outtype", "f32"]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
RUN = """
import ctypes, json, sys
import llama_cpp as llama, numpy as np
path, key, used, prompt, size, out = sys.argv[1:]
used, prompt, size = int(used), json.loads(prompt), int(size)
llama.llama_backend_init()
loading = llama.llama_model_default_params()
loading.n_gpu_layers = 0
override = (llama.llama_model_kv_override * 2)()
override[0].key, override[0].tag = key.encode(), llama.LLAMA_KV_OVERRIDE_TYPE_INT
override[0].value.val_i64, override[1].key = used, b""
loading.kv_overrides = override
model = llama.llama_model_load_from_file(path.encode(), loading)
settings = llama.llama_context_default_params()
settings.n_ctx = settings.n_batch = 256
settings.type_k = settings.type_v = 0  # fp32
context = llama.llama_init_from_model(model, settings)
tokens = (llama.llama_token * len(prompt))(*prompt)
assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(prompt))) == 0
logits = ctypes.cast(llama.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float))
np.save(out, np.ctypeslib.as_array(logits, (size,)))
"""


def prepare(source: Path, copy: Path) -> None:
    """The checkpoint with an output layer of its own."""
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        weights = load_file(copy / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def expected(checkpoint: Path, used: int, prompt: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities of transformers, fp32."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_experts_per_tok = used
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()
    return found


def main() -> None:
    """Convert, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-source", type=Path, required=True, help="folder of llama.cpp, for its converter")
    parser.add_argument("--llama-python", type=Path, required=True, help="of an environment with llama-cpp-python")
    parser.add_argument("--used", type=int, nargs="+", default=[16, 12, 9, 8, 5], help="experts of a token")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/llama_export.json"))
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.checkpoint)
    made = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(5, config.vocab_size, (args.tokens,), generator=made).tolist()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy, gguf, out = Path(folder) / "model", Path(folder) / "model.gguf", Path(folder) / "logits.npy"
        prepare(args.checkpoint, copy)
        source = args.llama_source.resolve()
        path = os.pathsep.join([str(source), str(source / "gguf-py")])
        convert = [sys.executable, "-c", CONVERT, str(copy), str(gguf)]
        subprocess.run(convert, check=True, cwd=source, env=os.environ | {"PYTHONPATH": path})
        for used in args.used:
            key = f"{config.model_type}.expert_used_count"
            words = [str(gguf), key, str(used), json.dumps(prompt), str(config.vocab_size), str(out)]
            subprocess.run([args.llama_python, "-c", RUN, *words], check=True, stderr=subprocess.DEVNULL)
            theirs = torch.from_numpy(np.load(out)).double().log_softmax(-1).numpy()
            ours = expected(copy, used, prompt)
            rows.append(
                {
                    "used": used,
                    "largest_difference": float(np.abs(theirs - ours).max()),
                    "kl": float((np.exp(ours) * (ours - theirs)).sum()),
                }
            )
            print(rows[-1], flush=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "tokens": args.tokens,
        "versions": versions(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
