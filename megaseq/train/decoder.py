"""The decoding job: hypotheses and scores of a checkpoint, of every checkpoint of a run, or the text of a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megaseq.train import parts
from megaseq.train.decoding import TextHypothesis, decode_texts
from megaseq.train.jobs import Edit, Job, run_once, watch_run
from megaseq.train.saving import TrainedModel, load_trained
from megaseq.train.tracking import Callback
from megaseq.train.validation import Validation

Report = Callable[[str], object]


def _scored(model: TrainedModel, validation: Validation, *, report: Report) -> dict[str, float]:
    with model.evaluating() as task:
        figures = validation.decode(task, step=model.step)
    for name, scores in validation.last_scores.items():
        for key, score in scores.items():
            signature = f"  {score.signature}" if score.signature else ""
            report(f"{name} step {model.step} {key} {score.value:.2f}{signature}")
    if validation.run_dir is not None and figures:
        report(f"hypotheses: {validation.run_dir.decodes(step=model.step)}")
    return figures


def decode_checkpoint(
    path: Path | str,
    *,
    report: Report,
    callback: Callback | None = None,
    edit: Edit = lambda params: None,
    averaged: bool = True,
) -> dict[str, float]:
    """Decodes and scores the evaluation inputs with a checkpoint, or with the newest of a run directory.

    Args:
        path: of a checkpoint or a run directory; in a run directory the hypotheses go to RUN/decodes.
        report: told each score with its signature, a line each.
        callback: hears of figures and samples.
        edit: changes the checkpoint's params first.
        averaged: use the moving averages where there are any.
    """

    def work(model: TrainedModel, validation: Validation) -> dict[str, float]:
        return _scored(model, validation, report=report)

    return run_once(Job(name="decode", work=work, edit=edit, averaged=averaged), path=path, callback=callback)


def watch(path: Path | str, *, report: Report, edit: Edit, averaged: bool = True, poll_seconds: float = 5.0) -> None:
    """Decodes with each checkpoint of the run in `path` once, until training is finished; figures go to RUN/decode."""

    def work(model: TrainedModel, validation: Validation) -> dict[str, float]:
        return _scored(model, validation, report=report)

    watch_run(Job(name="decode", work=work, edit=edit, averaged=averaged), path=path, poll_seconds=poll_seconds)


def decode_lines(
    path: Path | str,
    *,
    lines: Iterable[str],
    lines_at_once: int = 1024,
    edit: Edit = lambda params: None,
    averaged: bool = True,
) -> Iterator[tuple[str, list[TextHypothesis]]]:
    """Yields (source, hypotheses, best first) of each of `lines`, in order.

    Args:
        path: of a checkpoint or a run directory.
        lines: source texts, tags included; line ends are taken off.
        lines_at_once: read before any of them is decoded: more of them fill batches better.
        edit: changes the checkpoint's params first.
        averaged: use the moving averages where there are any.
    """
    model = load_trained(path, edit=edit, averaged=averaged)
    parts.set_up_process(model.params)
    rest = iter(lines)
    done = 0
    while chunk := [line.rstrip("\r\n") for line in itertools.islice(rest, lines_at_once)]:
        with model.evaluating() as task:
            decoded = decode_texts(
                task, texts=chunk, vocabulary=model.vocabulary, search=task.default_search(), first_key=done
            )
        done += len(chunk)
        yield from zip(chunk, decoded, strict=True)
