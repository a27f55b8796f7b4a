"""Weights & Biases: one run per job, gone on with under the same id after a restart."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaseq.base import optional
from megaseq.train.tracking.callback import Callback, RunFacts, Sample

_ID_FILE = "wandb_id"


def stored_run_id(run_dir: Path) -> str:
    """Returns the wandb id of the run in `run_dir`; a new one is made, and kept there, the first time."""
    path = run_dir / _ID_FILE
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _mode(asked: str) -> str:
    """Resolves `auto`: what WANDB_MODE says, else online where a key is at hand, else offline (never a prompt)."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.exists() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    )
    return "online" if has_key else "offline"


class WandbWriter(Callback):
    """Sends metrics, params, git state and decoded samples to wandb.

    Figures are plotted over our own `step`: wandb's step counter cannot go back, which a run that
    goes on from a checkpoint before its last logged step must.
    """

    def __init__(self, *, project: str, entity: str = "", mode: str = "auto", tags: Sequence[str] = ()) -> None:
        self._wandb: Any = optional("wandb", needed_for="tracking.wandb")
        self._project, self._entity, self._mode, self._tags = project, entity, mode, tuple(tags)
        self._run: Any = None

    def on_start(self, facts: RunFacts) -> None:
        self._run = self._wandb.init(
            project=self._project,
            entity=self._entity or None,
            name=f"{facts.name} ({facts.run_dir.name})",
            id=stored_run_id(facts.run_dir),
            resume="allow",
            mode=_mode(self._mode),
            dir=str(facts.run_dir),
            tags=list(self._tags) or None,
            config={"params": dict(facts.params), "git": dict(facts.git), "run_dir": str(facts.run_dir)},
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._run is not None:
            self._run.log({**metrics, "step": step})

    def on_samples(self, samples: Sequence[Sample], *, step: int, name: str) -> None:
        if self._run is None:
            return
        rows = [[step, sample.source, sample.output, sample.reference] for sample in samples]
        table = self._wandb.Table(columns=["step", "source", "output", "reference"], data=rows)
        self._run.log({f"decode/{name}/samples": table, "step": step})

    def on_finish(self, *, status: str) -> None:
        if self._run is not None:
            self._run.summary["status"] = status
            self._run.finish(exit_code=1 if status == "failed" else 0)
            self._run = None
