"""The watchdog ends a process whose main thread cannot, and says where it stood."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PREPARE = """
import time
from megaseq.parallel.watchdog import Watchdog
dog = Watchdog(rank=3, timeout_seconds=0.4, poll_seconds=0.05)
told = []
def stands_still():
    time.sleep(30)
"""


def run(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREPARE + text], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


def test_standing_still_is_reported_with_the_stack() -> None:
    started = time.monotonic()
    done = run(
        "dog.start(failed_elsewhere=lambda: None, tell=lambda line: print(line, flush=True))\n"
        "dog.beat(step=7, doing='training step')\n"
        "stands_still()"
    )
    assert done.returncode == 3
    assert time.monotonic() - started < 25
    assert "megaseq: rank 3 has stood still for 0 s after step 7: training step\n" in done.stderr
    assert "in stands_still" in done.stderr
    assert done.stdout == "rank 3 has stood still for 0 s after step 7: training step\n"


def test_beats_and_pauses_keep_it_quiet() -> None:
    done = run(
        "dog.start(failed_elsewhere=lambda: None, tell=print)\n"
        "for _ in range(8):\n    time.sleep(0.1); dog.beat()\n"
        "with dog.paused('reading'):\n    time.sleep(1)\n"
        "dog.stop(); time.sleep(1)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_failure_of_another_rank_ends_a_process_that_waits() -> None:
    started = time.monotonic()
    done = run("dog.timeout_seconds = 100.0\ndog.start(failed_elsewhere=lambda: 2, tell=print)\nstands_still()")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert time.monotonic() - started < 25


def test_of_a_hang_elsewhere_every_rank_says_where_it_stands() -> None:
    done = run("dog.timeout_seconds = 100.0\ndog.start(failed_elsewhere=lambda: 3, tell=print)\nstands_still()")
    assert done.returncode == 3
    assert "in stands_still" in done.stderr
