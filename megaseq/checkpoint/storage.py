"""Storage for torch.distributed.checkpoint that holds tensors in safetensors files and its metadata in JSON.

The storage that comes with torch pickles its metadata, and whoever unpickles a file runs what its author put in there.
Here nothing is ever pickled or unpickled. A rank writes one file for each first component of the tensors' names
("task.00000.safetensors" holds what rank 0 has of "task...."), so that decoding reads the parameters and not the
optimizer's state. The parts of a sharded tensor are stored as "<name>@<offset>,<offset>" with its global shape in the
metadata: what torch.distributed.checkpoint needs to read it back on any other layout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megaseq.base.errors import CheckpointError
from megaseq.checkpoint.manifest import METADATA, is_safe_name
from megaseq.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    FileDigest,
    TensorEntry,
    write_entries,
    write_file,
)

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True)
class StoredChunk:
    """Where one part of a tensor lies: the file, and its name in there; of a write also the file's digest."""

    file: str
    key: str
    digest: FileDigest | None = None


class SafetensorsWriter(StorageWriter):
    """Writes a checkpoint's tensors into an existing directory; `files` has the digests afterwards (coordinator)."""

    def __init__(self, directory: Path, *, check_finite: bool = False) -> None:
        """Prepares writing to `directory`; with `check_finite` a nan or inf is a CheckpointError."""
        super().__init__()
        self._directory = directory
        self._check_finite = check_finite
        self.files: dict[str, FileDigest] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Keeps the directory: one writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Gives every plan its rank, which names its files."""
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's parts, a file for each first component of the names."""
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(_group(item.index.fqn), []).append(item)
        results: list[WriteResult] = []
        for group, items in sorted(groups.items()):
            file = f"{group}.{plan.storage_data:05d}.safetensors"
            keys = [_key(item) for item in items]
            entries = [self._entry(item, key=key, planner=planner) for item, key in zip(items, keys, strict=True)]
            digest = write_entries(self._directory / file, entries=entries, metadata={"format": "pt"})
            results.extend(
                WriteResult(
                    index=item.index,
                    size_in_bytes=item.tensor_storage_size() or 0,
                    storage_data=StoredChunk(file=file, key=key, digest=digest),
                )
                for item, key in zip(items, keys, strict=True)
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _entry(self, item: WriteItem, *, key: str, planner: SavePlanner) -> TensorEntry:
        if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
            raise CheckpointError(
                f"{item.index.fqn}: must be a tensor, but is not. Put other values into the JSON state."
            )

        def resolve() -> Tensor:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{item.index.fqn}: must be a tensor, but is {type(tensor).__name__}. Convert it."
                )
            if self._check_finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{item.index.fqn}: must be finite to be saved, but has nan or inf. Go back to the "
                    f"checkpoint before."
                )
            return tensor

        data = item.tensor_data
        return TensorEntry(name=key, dtype=data.properties.dtype, shape=tuple(data.chunk.sizes), resolve=resolve)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the metadata of all ranks' parts."""
        chunks: dict[MetadataIndex, StoredChunk] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunks[result.index] = result.storage_data
            self.files[result.storage_data.file] = result.storage_data.digest
        metadata.storage_data = chunks
        text = json.dumps(metadata_to_json(metadata), separators=(",", ":")).encode()
        self.files[METADATA] = write_file(self._directory / METADATA, data=text)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accepts every path."""
        return True


class SafetensorsReader(StorageReader):
    """Reads tensors, or parts of them, from a checkpoint directory."""

    def __init__(self, directory: Path, *, metadata: Metadata) -> None:
        """Prepares reading from `directory`, which `metadata` (from `read_metadata`) describes."""
        super().__init__()
        self._directory = directory
        self._metadata = metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Keeps the directory: one reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the metadata."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the parts that the plan asks for into their tensors, file by file."""
        requests: dict[str, list[ReadItem]] = {}
        for request in plan.items:
            requests.setdefault(self._metadata.storage_data[request.storage_index].file, []).append(request)
        for file, items in requests.items():
            with safe_open(self._directory / file, framework="pt") as opened:
                for request in items:
                    self._read_one(opened, request, planner=planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_one(self, opened: Any, request: ReadItem, *, planner: LoadPlanner) -> None:
        if request.type != LoadItemType.TENSOR:
            raise CheckpointError(f"{request.dest_index.fqn}: must be a tensor, but is not. Ask for tensors only.")
        key = self._metadata.storage_data[request.storage_index].key
        if request.lengths:
            where = tuple(slice(o, o + n) for o, n in zip(request.storage_offsets, request.lengths, strict=True))
            source = opened.get_slice(key)[where]
        else:
            source = opened.get_tensor(key)
        target = planner.resolve_tensor(request).detach()
        target.copy_(source)
        planner.commit_tensor(request, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accepts every path."""
        return True


def _group(name: str) -> str:
    first = name.split(".", 1)[0]
    return first if _PLAIN.fullmatch(first) else "tensors"


def _key(item: WriteItem) -> str:
    """Names a part in its file: the tensor's own name when it is whole."""
    data = item.tensor_data
    if data is None or data.chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def metadata_to_json(metadata: Metadata) -> dict[str, Any]:
    """Returns {name: {dtype, shape, chunks: [{offsets, sizes, file, key}]}}."""
    content: dict[str, Any] = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(tensor, TensorStorageMetadata):
            raise CheckpointError(f"{name}: must be a tensor, but is not. Put other values into the JSON state.")
        chunks = []
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
            chunks.append({**place, "file": stored.file, "key": stored.key})
        content[name] = {"dtype": DTYPE_NAMES[tensor.properties.dtype], "shape": list(tensor.size), "chunks": chunks}
    return content


def read_metadata(directory: Path, *, known_files: Iterable[str]) -> Metadata:
    """Reads what `metadata_to_json` wrote; every value is checked, because a stranger may have written the file.

    Raises:
        CheckpointError: When it does not have the form, or names a file that is not among `known_files`.
    """
    path = directory / METADATA
    known = set(known_files)
    tensors: dict[str, Any] = {}
    chunks: dict[MetadataIndex, StoredChunk] = {}
    try:
        for name, entry in json.loads(path.read_bytes()).items():
            shape = _sizes(entry["shape"])
            parts = []
            for chunk in entry["chunks"]:
                part = ChunkStorageMetadata(offsets=_sizes(chunk["offsets"]), sizes=_sizes(chunk["sizes"]))
                if not len(part.offsets) == len(part.sizes) == len(shape):
                    raise ValueError(f"{name} has a part of another rank")
                if chunk["file"] not in known or not is_safe_name(chunk["file"]):
                    raise ValueError(f"{name} is in {chunk['file']!r}, which the manifest does not list")
                parts.append(part)
                chunks[MetadataIndex(name, part.offsets)] = StoredChunk(file=chunk["file"], key=str(chunk["key"]))
            if not _tile(parts, shape=shape):
                raise ValueError(f"the parts of {name} do not make up {list(shape)}")
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties=properties, size=shape, chunks=parts)
    except OSError as error:
        raise CheckpointError(f"{path}: must be readable, but is not ({error.strerror}). Use another one.") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: must describe tensors, but has a bad entry ({error}). Use another one."
        ) from None
    return Metadata(state_dict_metadata=tensors, storage_data=chunks)


def _sizes(values: Any) -> torch.Size:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return torch.Size(values)


def _tile(parts: Sequence[ChunkStorageMetadata], *, shape: torch.Size) -> bool:
    """Says whether the parts lie inside `shape`, do not overlap and leave nothing out."""
    spans = [[(offset, offset + size) for offset, size in zip(part.offsets, part.sizes, strict=True)] for part in parts]
    inside = all(end <= size for span in spans for (_, end), size in zip(span, shape, strict=True))
    overlap = any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
        for one, other in itertools.combinations(spans, 2)
    )
    return inside and not overlap and bool(parts) and sum(part.sizes.numel() for part in parts) == shape.numel()
