"""Which kernels have run on which GPU, with the source that they have now; written into a page of the docs."""

from __future__ import annotations

from pathlib import Path

from megaseq.kernels.bench import results
from megaseq.kernels.catalogue import kernel_names, ops_with_kernels, source_hash
from megaseq.kernels.checks import KernelError

START, END = "<!-- ledger: written by `megaseq bench ledger` -->", "<!-- end of the ledger -->"


def ledger(folder: Path) -> str:
    """The ledger as Markdown, with the tables of all runs.

    Args:
        folder: the JSON files of `megaseq bench kernels`; none, if it does not exist.
    """
    runs = [results.read(path) for path in sorted(folder.glob("*.json"))]
    lines = ["| op | kernels | source | has run on |", "|---|---|---|---|"]
    for op in ops_with_kernels():
        source = source_hash(op)
        cards = [where.card for where, _, sources in runs if sources.get(op) == source]
        older = [where.card for where, _, sources in runs if sources.get(op, source) != source]
        ran = ", ".join([*cards, *(f"{card} (an older source)" for card in older)]) or "never on a GPU"
        lines.append(f"| `{op}` | {', '.join(kernel_names(op))} | `{source}` | {ran} |")
    tables = [results.to_markdown(where, results=found) for where, found, _ in runs]
    return "\n".join([*lines, "", *tables])


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
    """Writes the ledger into `page`."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), content=ledger(folder)), encoding="utf-8")
