"""A checkpoint that a stranger made: nothing in it is executed, and nothing outside it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megaseq.checkpoint
import megaseq.learner
from megaseq.base import CheckpointError
from megaseq.checkpoint import Checkpointer, inspect, load_checkpoint
from megaseq.checkpoint.manifest import _checksum

from .conftest import save
from .test_checkpointer import ALL_FILES

Make = Callable[..., Checkpointer]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def seal(path: Path) -> None:
    """Makes the manifest fit the files as they are, as a stranger would."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    for name, entry in content["files"].items():
        data = (path / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (path / "manifest.json").write_text(json.dumps({**content, "checksum": _checksum(content)}))


@pytest.mark.parametrize("name", [*ALL_FILES, ".metadata", "data.pkl"])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_pickle_in_place_of_any_file_is_never_executed(make: Make, tmp_path: Path, name: str, form: str) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    path, target = checkpointer.path(1), tmp_path / "executed"
    payload = pickle.dumps(Bomb(target))
    if form == "zip":
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3")
    else:
        (path / name).write_bytes(payload)
    if name != "manifest.json":
        seal(path)
    for use in (load_checkpoint, inspect, megaseq.checkpoint.average):
        with contextlib.suppress(CheckpointError):
            use([path] if use is megaseq.checkpoint.average else path)
        assert not target.exists()
    # Were it read as torch's own storage reads it, it would have been executed.
    pickle.loads(payload)
    assert target.exists()


def test_no_module_unpickles() -> None:
    """Looks for every way that torch and Python have."""
    forbidden = re.compile(
        r"\b(import pickle|pickle\.|torch\.load|FileSystemReader|np\.load|numpy\.load|shelve|marshal)"
    )
    for package in (megaseq.checkpoint, megaseq.learner):
        for path in Path(package.__path__[0]).glob("*.py"):
            assert not forbidden.search(path.read_text()), path


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "files/../../outside", "a\\..\\b"])
def test_a_manifest_cannot_name_files_outside(make: Make, name: str) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    path = checkpointer.path(1)
    (path.parent / "outside").write_bytes(b"secret")
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    content["files"][name] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (path / "manifest.json").write_text(json.dumps({**content, "checksum": _checksum(content)}))
    with pytest.raises(CheckpointError, match="leaves the directory"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["chunks"][0].update(file="../../x"),
        lambda entry: entry["chunks"][0].update(file="state.json.other"),
        lambda entry: entry["chunks"][0].update(file="state.json"),
        lambda entry: entry["chunks"][0].update(key="no such"),
        lambda entry: entry["chunks"][0].update(sizes=[-1, 5]),
        lambda entry: entry["chunks"][0].update(sizes=[7]),
        lambda entry: entry["chunks"][0].update(sizes=[9, 9]),
        lambda entry: entry["chunks"][0].update(offsets="00"),
        lambda entry: entry.update(dtype="object"),
        lambda entry: entry.update(shape=[10, 5]),
        lambda entry: entry.update(shape=[True, 5]),
        lambda entry: entry.update(chunks=[]),
        lambda entry: entry.update(chunks=None),
    ],
)
def test_tensor_descriptions_that_do_not_fit_are_refused(make: Make, change: Any) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    path = checkpointer.path(1)
    content = json.loads((path / "tensors.json").read_text())
    change(content["task.encoder.weight"])
    (path / "tensors.json").write_text(json.dumps(content))
    seal(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', '{"task.a": 3}', '{"a": {"dtype": "F32"}}', "[" * 100_000])
@pytest.mark.parametrize("name", ["tensors.json", "manifest.json", "state.json"])
def test_json_of_another_form_is_refused(make: Make, name: str, text: str) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    (checkpointer.path(1) / name).write_text(text)
    if name != "manifest.json":
        seal(checkpointer.path(1))
    if name == "state.json" and text.startswith("{"):
        assert load_checkpoint(checkpointer.path(1)).state == json.loads(text)
        return
    with pytest.raises(CheckpointError):
        load_checkpoint(checkpointer.path(1))
