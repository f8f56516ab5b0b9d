from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_export import expected, prepare
from making import save_stock
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_has_an_output_layer_and_the_same_results(tied: bool, tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", tie_word_embeddings=tied)
    prepare(stock, tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert not copy.config.tie_word_embeddings
    prompt = [5, 9, 33, 2]
    assert (expected(tmp_path / "copy", 3, prompt) == expected(stock, 3, prompt)).all()
    assert (expected(stock, 4, prompt) != expected(stock, 3, prompt)).any()
