"""Builds the parts of a run from its params: vocabulary, task, inputs; the same way in every job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megaseq.base import FROM_PARENT
from megaseq.base.errors import AsText, ParamsError, must
from megaseq.data.input import Input
from megaseq.data.vocabulary import Vocabulary
from megaseq.decode import Search
from megaseq.parallel.process import current_team
from megaseq.parallel.spawn import cores_of_rank
from megaseq.tasks.base import BaseTask
from megaseq.train.experiment import Run
from megaseq.train.host_memory import keep_freed_memory

VOCABULARY = "vocabulary"
"""Folder of the tokenizers' files, in a run directory and in a checkpoint."""


def check_params(params: Run.Params) -> None:
    """Raises ParamsError with every problem of the tree, one a line."""
    problems = params.check()
    if problems:
        raise ParamsError("\n".join(str(problem) for problem in problems))


def set_up_process(params: Run.Params) -> None:
    """Sets what holds for the whole process: threads, kept memory, no denormals (slow, and they mean nothing here)."""
    keep_freed_memory()
    place = current_team().place
    if params.train.num_threads:
        torch.set_num_threads(params.train.num_threads)
    elif place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_rank(place, environment=os.environ))
    torch.set_flush_denormal(True)


def cache_dir(params: Run.Params, *, run_dir: Path) -> Path:
    """Returns where token caches go."""
    return Path(params.train.cache_dir).expanduser() if params.train.cache_dir else run_dir / "cache"


def vocabulary_of(params: Run.Params, *, files: Mapping[str, bytes]) -> Vocabulary:
    """Restores the vocabulary from `files` whose names begin with the vocabulary folder."""
    prefix = f"{VOCABULARY}/"
    own = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
    vocabulary: Vocabulary = params.vocabulary.instantiate(files=own)
    return vocabulary


def read_vocabulary(params: Run.Params, *, directory: Path) -> Vocabulary:
    """Restores the vocabulary from the files in `directory`."""
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if not path.name.startswith(".")}
    vocabulary: Vocabulary = params.vocabulary.instantiate(files=files)
    return vocabulary


def task_params(params: Run.Params, *, vocabulary: Vocabulary) -> BaseTask.Params:
    """Returns the task's params with the vocabulary's sizes and special tokens where the experiment leaves them open.

    Raises:
        ParamsError: the experiment sets a size, and the vocabulary has more tokens than that.
    """
    task = params.task.copy()
    sizes = {"source_vocab_size": vocabulary.source.vocab_size, "target_vocab_size": vocabulary.target.vocab_size}
    for name, size in sizes.items():
        if name not in task:
            continue
        if task.get(name) is FROM_PARENT:
            task.set(name, size, origin="the vocabulary")
        elif task.get(name) < size:
            raise must(
                f"task.{name}",
                f"be at least the {size} tokens of the vocabulary",
                task.get(name),
                "Leave it unset, or make the vocabulary smaller",
            )
    tokens = {"target_sos_id": vocabulary.target.bos_id, "target_eos_id": vocabulary.target.eos_id}
    for path, search in task.find(Search):
        for name, token in tokens.items():
            if search.get(name) is None:
                task.set(f"{path}.{name}", token, origin="the vocabulary")
    return task


def train_input(
    params: Run.Params, *, vocabulary: Vocabulary, cache: Path, data_rank: int = 0, data_ranks: int = 1
) -> Input:
    """Returns the training input of one data rank; it shuffles by the run's seed unless it has its own."""
    own = params.train_input
    own = own.replace(seed=params.seed) if own.seed is None else own
    made: Input = own.instantiate(vocabulary=vocabulary, cache_dir=cache, data_rank=data_rank, data_ranks=data_ranks)
    return made


def eval_inputs(
    params: Run.Params,
    *,
    names: tuple[str, ...],
    vocabulary: Vocabulary,
    cache: Path,
    data_rank: int = 0,
    data_ranks: int = 1,
) -> dict[str, Input]:
    """Returns one data rank's evaluation inputs called `names`, or all if there are none.

    Raises:
        ParamsError: there is no input of one of the names.
    """
    return {
        name: input_params.instantiate(
            vocabulary=vocabulary, cache_dir=cache, data_rank=data_rank, data_ranks=data_ranks
        )
        for name, input_params in chosen_inputs(params, names=names)
    }


def chosen_inputs(params: Run.Params, *, names: tuple[str, ...]) -> Iterator[tuple[str, Input.Params]]:
    """Yields (name, params) of the evaluation inputs called `names`, or of all if there are none."""
    for name in names or tuple(params.eval_inputs):
        if name not in params.eval_inputs:
            known = ", ".join(params.eval_inputs) or "none"
            raise must("evaluation inputs", f"be among {known}", AsText(name), "Choose one of them")
        yield name, params.eval_inputs[name]


def all_texts(input_params: Input.Params, *, limit: int = 0) -> tuple[list[str], list[str]]:
    """Returns the source texts, tags included, and the reference texts of an input; the first `limit`, or all."""
    from megaseq.data.mixture import components

    sources: list[str] = []
    references: list[str] = []
    for component in components(input_params.source):
        for chunk in component.source.stream():
            sources += [text.decode() for text in chunk.source]
            references += [text.decode() for text in chunk.target]
            if limit and len(sources) >= limit:
                return sources[:limit], references[:limit]
    return sources, references
