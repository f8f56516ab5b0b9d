"""Trains one tiny model that the tests of the training script share."""

from __future__ import annotations

import pytest
import torch
from reference_samples import OPTIONS, Trained, sentences


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """40 steps of training and an export, by the command itself."""
    import train_reference  # found by the path that reference_samples adds

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    run = Trained(folder / "train.txt", folder / "held_out.txt", folder / "work", folder / "model")
    run.text.write_text(sentences(4000, seed=0))
    run.held_out.write_text(sentences(300, seed=1))
    command = [str(run.text), *OPTIONS, "--workdir", str(run.workdir), "--out", str(run.out)]
    train_reference.main([*command, "--eval", str(run.held_out), "--data-note", "Sentences of a toy grammar."])
    return run
