"""A process that is killed while it saves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaseq.checkpoint import Checkpointer

SAVER = """
import sys, torch
from megaseq.checkpoint import Checkpointer
checkpointer = Checkpointer.Params(keep_last=2, asynchronous=sys.argv[2] == "1").instantiate(directory=sys.argv[1])
step = checkpointer.latest() or 0
while True:
    step += 1
    tensors = {f"task.{i}": torch.full((256, 256), float(step)) for i in range(32)}
    checkpointer.save(step=step, tensors=tensors, state={"step": step})
    checkpointer.wait()
    print(step, flush=True)
"""


def save_and_kill(folder: Path, *, asynchronous: bool, seconds: float) -> int:
    """Starts a process that saves without end and kills it; returns the last step that it said was saved."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(int(asynchronous))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    said = int(process.stdout.readline())
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split("\n")[:-1]
    process.wait()
    return int(rest[-1]) if rest else said


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_saved_checkpoint_survives_a_kill_at_any_time(tmp_path: Path, asynchronous: bool) -> None:
    moments = random.Random(1)
    last = 0
    for _ in range(4):
        last = save_and_kill(tmp_path, asynchronous=asynchronous, seconds=moments.uniform(0.05, 0.3))
        restored = Checkpointer.Params().instantiate(directory=tmp_path, read_only=True).restore()
        assert restored.messages == ()
        # The one in work when the kill came may have been renamed just before it.
        assert restored.step in (last, last + 1)
        assert restored.state == {"step": restored.step}
        assert all(torch.equal(t, torch.full((256, 256), float(restored.step))) for t in restored.tensors.values())
    Checkpointer.Params().instantiate(directory=tmp_path)
    assert all(name.startswith("step_") for name in os.listdir(tmp_path))
    assert last > 4
