"""Which kernels have run on which GPU, with the source that they have now; written into a page of the docs."""

from __future__ import annotations

from pathlib import Path

from megaseq.kernels.bench import record, results
from megaseq.kernels.bench.record import Record
from megaseq.kernels.catalogue import kernel_names, ops_with_kernels, source_hash
from megaseq.kernels.checks import KernelError, fail

START, END = "<!-- ledger: written by `megaseq bench ledger` -->", "<!-- end of the ledger -->"


def ledger(folder: Path) -> str:
    """The ledger as Markdown, with the tables of all runs.

    Args:
        folder: the JSON files of `megaseq bench kernels`; none, if it does not exist.
    """
    runs = [record.read(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith("sm_")]
    lines = ["| op | source | kernel | has been right on |", "|---|---|---|---|"]
    for op in ops_with_kernels():
        source = source_hash(op)
        for kernel in kernel_names(op):
            ran = [_place(run, op=op, source=source) for run in runs if op in run.ops and kernel in run.ops[op].kernels]
            lines.append(f"| `{op}` | `{source}` | {kernel} | {', '.join(ran) or 'never on a GPU'} |")
    tables = [results.to_markdown(run.machine, results=run.results(run.ops)) for run in runs]
    return "\n".join([*lines, "", *tables])


def _place(run: Record, *, op: str, source: str) -> str:
    """The card of a run that launched a kernel of an op, and what else there is to say."""
    found = run.ops[op]
    words = ["an older source"] * (found.source != source) + ["other cases are wrong"] * bool(found.wrong)
    return run.machine.card + (f" ({', '.join(words)})" if words else "")


def replaced(page: str, *, content: str) -> str:
    """The page with `content` between its marks.

    Raises:
        KernelError: if it has not both marks.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise KernelError(f"ledger: the page must have the lines {START!r} and {END!r}, but lacks them. Add them.")
    return f"{before}{START}\n\n{content}\n{END}{after}"


def write_ledger(page: Path, *, folder: Path) -> None:
    """Writes the ledger into `page`.

    Raises:
        KernelError: if the page cannot be read or lacks the marks, or a run cannot be read.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise fail(
            str(page), op="ledger", expected="be a page of text", came=f"none ({why})", remedy="Name docs/kernels.md"
        ) from error
    page.write_text(replaced(old, content=ledger(folder)), encoding="utf-8")
