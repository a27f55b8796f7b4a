"""What a search has found, for a person to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megaseq.train.planning.cost import PARTS
from megaseq.train.planning.hardware import Hardware
from megaseq.train.planning.memory import gib
from megaseq.train.planning.search import Estimate, Findings, micro_batch_shape
from megaseq.train.planning.subject import Subject

WHAT_COSTS = {
    "compute": "products on fewer or smaller shares",
    "recompute": "layers computed again",
    "bubble": "waiting in the pipeline",
    "tensor": "exchanges between tensor ranks",
    "context": "exchanges between context ranks",
    "expert": "tokens that travel to experts",
    "pipe": "activations between stages",
    "data": "gradients and weights between data ranks",
    "offload": "what travels between devices and hosts",
    "optimizer": "updating more weights a rank",
}


def report(subject: Subject, *, findings: Findings, hardware: Hardware, top: int) -> Iterator[str]:
    """Yields the lines of the report: the subject, the best layouts, how to ask for the first, why not the others."""
    batch = subject.batch
    yield (
        f"{subject.params.name}: {subject.num_parameters / 1e6:.1f} million parameters, {subject.precision}; "
        f"a step has {batch.rows} rows of {batch.source_length} + {batch.target_length} tokens"
    )
    yield (
        f"{hardware.devices} devices of {hardware.memory_gib:g} GiB, {hardware.devices_per_machine} a machine: "
        f"{hardware.tflops:g} Tflop/s at {hardware.efficiency:.0%}, memory {hardware.memory_bandwidth:g}, links "
        f"{hardware.link_bandwidth:g}, network {hardware.bandwidth:g} GB/s"
    )
    yield ""
    best = distinct(findings.fitting, top=top)
    if not best:
        yield "No layout fits."
        smallest = findings.too_large[:1]
        if smallest:
            yield f"The smallest needs {gib(smallest[0].memory.total)}: {smallest[0].candidate.overrides()}"
            yield "Use more devices, or fewer rows a step (train_input.batching.rows)."
    else:
        yield from _table(best, subject=subject)
        yield ""
        yield f"megaseq train {subject.params.name} {best[0].candidate.overrides()}"
    yield ""
    yield "Why not the others"
    yield from _rejections(findings, best=best, hardware=hardware)


def distinct(estimates: Sequence[Estimate], *, top: int) -> list[Estimate]:
    """Returns the best of each (axes, ZeRO stage), in order, so that a table does not show one layout ten times."""
    found: dict[object, Estimate] = {}
    for estimate in estimates:
        candidate = estimate.candidate
        found.setdefault((candidate.layout, candidate.parallel.zero.stage), estimate)
        if len(found) == top:
            break
    return list(found.values())


def _table(best: Sequence[Estimate], *, subject: Subject) -> Iterator[str]:
    """Yields the table of the best layouts and, below it, what each spends and sends."""
    header = (
        "",
        "layout",
        "ZeRO",
        "micro",
        "step",
        "tokens/s",
        "memory",
        "weights",
        "grads",
        "state",
        "activ.",
        "bubble",
    )
    rows = [header, *(_row(number, estimate, subject=subject) for number, estimate in enumerate(best, start=1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [row[1].ljust(widths[1])] + [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([row[0].rjust(widths[0]), *cells]).rstrip()
    yield ""
    yield (
        "milliseconds of a step, exchanges as if nothing ran beside them, without sums of gradients that backward "
        "passes hide; bytes that a rank sends, by axis"
    )
    for number, estimate in enumerate(best, start=1):
        parts = [f"{part} {1e3 * estimate.cost.seconds[part]:.3g}" for part in PARTS if estimate.cost.seconds[part]]
        sent = [f"{axis} {gib(volume)}" for axis, volume in estimate.cost.sent.items() if volume]
        yield f"{number:>{widths[0]}}  {', '.join(parts)}; {', '.join(sent) or 'nothing sent'}"


def _row(number: int, estimate: Estimate, *, subject: Subject) -> tuple[str, ...]:
    candidate, memory, batch = estimate.candidate, estimate.memory, subject.batch
    layout = str(candidate.layout)
    extras: list[str] = [candidate.parallel.pipeline.schedule] if candidate.layout.pipe > 1 else []
    extras += ["sequence"] if candidate.sequence else []
    extras += [f"{candidate.checkpointing} checkpointing"] if candidate.checkpointing != "none" else []
    shape = micro_batch_shape(subject, candidate)
    tokens = batch.rows * (batch.source_length + batch.target_length) / estimate.cost.total
    return (
        str(number),
        ", ".join([layout, *extras]),
        str(candidate.parallel.zero.stage),
        f"{candidate.micro_batches} x {shape.rows} rows",
        f"{1e3 * estimate.cost.total:.2f} ms",
        f"{tokens / 1e6:.2f} M",
        gib(memory.total),
        gib(memory.parameters),
        gib(memory.gradients),
        gib(memory.optimizer),
        gib(memory.activations),
        f"{candidate.bubble():.0%}",
    )


def _rejections(findings: Findings, *, best: Sequence[Estimate], hardware: Hardware) -> Iterator[str]:
    """Yields a line for each reason, the commonest first within impossible, not considered, too large and slower."""
    for row in sorted(findings.rejected.values(), key=lambda row: (row.trains, -row.count)):
        what = "not considered" if row.trains else "impossible"
        yield f"  {row.count:5} {what}: {row.reason} (such as {row.example})"
    if findings.too_large:
        least = findings.too_large[0]
        biggest = max(("parameters", "gradients", "optimizer", "activations"), key=lambda n: getattr(least.memory, n))
        yield (
            f"  {len(findings.too_large):5} too large for {gib(hardware.usable_bytes)}: the smallest, "
            f"{least.candidate.layout}, needs {gib(least.memory.total)}, most of it {biggest}"
        )
    if not best:
        return
    winner = best[0]
    slower: dict[str, list[Estimate]] = {}
    for estimate in findings.fitting:
        if estimate is not winner:
            slower.setdefault(_what_costs(estimate, winner=winner), []).append(estimate)
    for part, group in sorted(slower.items(), key=lambda item: -len(item[1])):
        first = group[0]
        more = 1e3 * (first.cost.seconds[part] - winner.cost.seconds[part])
        ratio = first.cost.total / winner.cost.total
        yield (
            f"  {len(group):5} slower for {WHAT_COSTS[part]}: the best of them, {first.candidate.layout} with ZeRO "
            f"{first.candidate.parallel.zero.stage}, takes {ratio:.2f} x as long, {more:+.2f} ms there"
        )


def _what_costs(estimate: Estimate, *, winner: Estimate) -> str:
    """Returns the part of a step in which a layout loses most against the winner."""
    return max(PARTS, key=lambda part: estimate.cost.seconds[part] - winner.cost.seconds[part])
