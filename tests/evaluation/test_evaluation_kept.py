"""An interrupted measurement goes on where it was and gives the same numbers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from test_evaluation_measure import WINDOWS, scaled
from tiny import tiny_model

from moe_prism.evaluation.kept import Kept
from moe_prism.evaluation.measure import Run, measure

MODEL = tiny_model("olmoe")
RUNS = [Run("full", None), Run("hot", lambda: scaled(MODEL, -0.3)), Run("same", nullcontext)]
EACH = 3  # forward passes of a batch: the full model and two runs


def interrupted_after(passes: int, kept: Kept) -> None:
    def stop(done: int, _all: int) -> None:
        if done == passes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(MODEL, WINDOWS, RUNS, batch_size=2, progress=stop, kept=kept)


@pytest.mark.parametrize("passes", [1, EACH, EACH + 2, 2 * EACH])
def test_it_goes_on_where_it_was(tmp_path: Path, passes: int) -> None:
    kept = Kept(tmp_path / "sweep", "model")
    whole = measure(MODEL, WINDOWS, RUNS, batch_size=2)
    interrupted_after(passes, kept)
    seen: list[tuple[int, int]] = []
    again = measure(MODEL, WINDOWS, RUNS, batch_size=2, progress=lambda *at: seen.append(at), kept=kept)
    # The batch in which it stopped is done again: it is kept once its last pass is told of.
    first = (passes - 1) // EACH * EACH + 1
    assert seen == [(done, 3 * EACH) for done in range(first, 3 * EACH + 1)]
    for name, result in whole.items():
        np.testing.assert_array_equal(again[name].nll, result.nll)
        assert (again[name].kl, again[name].top1_agreement) == (result.kl, result.top1_agreement)
    kept.forget()
    assert not list(tmp_path.iterdir())


def test_others_have_other_files(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "model")
    names = [run.name for run in RUNS]
    files = {
        kept.file(WINDOWS, names, 2),
        kept.file(WINDOWS, names, 4),
        kept.file(WINDOWS, names[:2], 2),
        kept.file(WINDOWS + 1, names, 2),
        Kept(tmp_path, "another").file(WINDOWS, names, 2),
    }
    assert len(files) == 5


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "model")
    interrupted_after(2 * EACH, kept)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    assert Kept.read(path) == (0, {})


def test_a_place_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    kept = Kept(tmp_path / "file", "model")
    assert measure(MODEL, WINDOWS, RUNS, batch_size=2, kept=kept).keys() == {"full", "hot", "same"}
