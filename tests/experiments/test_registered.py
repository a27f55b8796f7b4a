"""Every registered experiment: sound params that survive a round trip, a golden text of them, and one tiny step.

After an intended change: `MEGASEQ_UPDATE_GOLDENS=1 pytest tests/experiments` writes the golden texts anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaseq.base import params_from_yaml, registry
from megaseq.train.experiment import Run
from megaseq.train.tracking.jsonl import read_metrics
from megaseq.train.trainer import Trainer

from .shrink import shrink

GOLDENS = Path(__file__).parents[1] / "goldens" / "params"
NAMES = registry.names()


def test_there_are_the_experiments_of_the_readme() -> None:
    assert {"quickstart.Numbers", "mt.multi30k.Base", "mt.multi30k.Small"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_params_are_sound_and_named(name: str) -> None:
    params = registry.params(name)
    assert isinstance(params, Run.Params)
    assert params.check() == []
    assert params.name == name
    assert registry.get(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_text_and_yaml_round_trips_are_identities(name: str) -> None:
    params = registry.params(name)
    for origins in (False, True):
        assert Run.Params.from_text(params.to_text(origins=origins)) == params
        assert params_from_yaml(params.to_yaml(origins=origins)) == params
    overlay = params.to_yaml(changed_only=True)
    assert Run.Params().apply_yaml(overlay) == params


@pytest.mark.parametrize("name", NAMES)
def test_params_are_the_golden_ones(name: str) -> None:
    golden = GOLDENS / f"{name}.txt"
    text = registry.params(name).to_text()
    if os.environ.get("MEGASEQ_UPDATE_GOLDENS"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.is_file(), f"no golden text; write it with MEGASEQ_UPDATE_GOLDENS=1 and look at it: {golden}"
    changed = Run.Params.from_text(golden.read_text(encoding="utf-8")).diff(registry.params(name))
    assert not changed, "\n".join(changed)
    assert text == golden.read_text(encoding="utf-8")


def test_no_golden_text_is_left_over() -> None:
    assert {path.stem for path in GOLDENS.glob("*.txt")} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_tiny_step(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    params = shrink(registry.params(name), directory=tmp_path / "data")
    assert Trainer(params, run_dir=tmp_path / "run").fit() == "finished"
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert records[0]["step"] == 1 and 0 < records[0]["train/loss"] < 20
    for data in params.eval_inputs:
        assert any(f"eval/{data}/loss" in record for record in records)
        assert any(f"decode/{data}/chrf" in record for record in records)
