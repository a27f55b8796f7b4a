"""What a run measured, and the table of it for people; `record.py` keeps it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
from collections.abc import Mapping, Sequence

import torch

from megaseq.kernels.bench.timing import Ceiling, Measured
from megaseq.kernels.bench_case import Timed

UNKNOWN = Ceiling(math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Result:
    """One case: our time, that of each peer, and how near it comes to what the card can do."""

    op: str
    case: str
    seconds: float
    host_seconds: float
    """Of the launch alone, as `Measured.host_seconds`."""
    peak_bytes: int
    share_of_ceiling: float
    """Of the copy bandwidth or of the rate of matrix products, whichever bounds the case; 0: neither is known."""
    rate: str
    """Such as "512 TFLOP/s"; empty where neither operations nor bytes are known."""
    peers: Mapping[str, Measured | str]
    """By name; the text of its error where a peer did not run."""
    goals: Mapping[str, float]
    """What the case is to reach, by peer, as `Timed.goals`."""

    def ratio(self, peer: str) -> float | None:
        """How many times as long the peer takes."""
        measured = self.peers[peer]
        return None if isinstance(measured, str) else measured.seconds / self.seconds

    def reached(self, goal: str) -> float:
        """What came of a goal; 0 for one beside a peer that did not run."""
        if goal == "ceiling":
            return self.share_of_ceiling
        peer, _, of_memory = goal.partition(":")
        measured = self.peers[peer]
        if isinstance(measured, str):
            return 0.0
        return measured.peak_bytes / max(self.peak_bytes, 1) if of_memory else measured.seconds / self.seconds

    def missed(self) -> list[str]:
        """The goals that were not met."""
        return [name for name, goal in self.goals.items() if self.reached(name) < goal]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the results hold for."""

    card: str
    architecture: int
    versions: Mapping[str, str]
    date: str
    ceiling: Ceiling


def machine(device: torch.device) -> Machine:
    """The machine that this runs on; its ceiling is not measured."""
    from megaseq.kernels.triton_runtime import triton

    on_gpu = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
    }
    card = torch.cuda.get_device_name(device) if on_gpu else "host"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Machine(card, 10 * major + minor, versions, today, UNKNOWN)


def result(
    *, op: str, case: str, timed: Timed, own: Measured, peers: Mapping[str, Measured | str], best: Ceiling
) -> Result:
    """Puts the times of a case in relation to the card's ceiling `best`."""
    shares = {
        "TFLOP/s": (timed.flops / own.seconds / 1e12, timed.flops / own.seconds / best.flops_per_second),
        "GB/s": (timed.bytes / own.seconds / 1e9, timed.bytes / own.seconds / best.bytes_per_second),
    }
    unit, (rate, share) = max(shares.items(), key=lambda item: item[1][1])
    text = f"{rate:.3g} {unit}" if rate else ""
    return Result(op, case, own.seconds, own.host_seconds, own.peak_bytes, share, text, dict(peers), dict(timed.goals))


def to_markdown(where: Machine, *, results: Sequence[Result]) -> str:
    """The table: a line for each case."""
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    best = where.ceiling
    lines = [
        f"{where.card} (sm_{where.architecture}), {versions}, {where.date}. Ceiling, measured: "
        f"{best.bytes_per_second / 1e9:.0f} GB/s copied, {best.flops_per_second / 1e12:.0f} TFLOP/s in bf16.",
        "",
        "| op | case | time | launch | peak memory | rate | of ceiling | times as long as ours | goals missed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in results:
        cells = (
            item.op,
            item.case,
            f"{item.seconds * 1e3:.3g} ms",
            f"{item.host_seconds * 1e3:.2g} ms",
            f"{item.peak_bytes / 2**20:.0f} MiB",
            item.rate,
            f"{item.share_of_ceiling:.0%}" if item.rate else "",
            ", ".join(_peer(item, name) for name in item.peers),
            ", ".join(f"{name} {item.goals[name]:g}" for name in item.missed()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _peer(item: Result, name: str) -> str:
    measured, ratio = item.peers[name], item.ratio(name)
    if isinstance(measured, str) or ratio is None:
        return f"{name}: did not run"
    return f"{name} {ratio:.2f} ({measured.peak_bytes / 2**20:.0f} MiB)"
