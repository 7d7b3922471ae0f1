"""The `.metadata` of a DCP checkpoint, which is a pickle, read without running any of it.

Only the names of DCP's own metadata classes are admitted, and none of them is imported: the pickle
builds inert records in their place. What it says is checked before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymcheck import tree
from asymcheck.errors import SourceError
from asymcheck.index import tile
from asymcheck.state import ShardSpec
from asymcheck_torch.inert_pickle import MAX_NBYTES, Member, Names, Record, Size, glimpse, read
from asymcheck_torch.tensors import TORCH_DTYPES


@dataclass(frozen=True)
class Piece:
    """A range of a file, relative to the checkpoint: what `torch.save` wrote of one value."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: dtype name, global shape, and the boxes that cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    boxes: dict[ShardSpec, Piece]


@dataclass(frozen=True)
class Entry:
    """A value of the state: DCP's name of it, its keys from the top, and where it is."""

    name: str
    keys: tuple[str | int, ...]
    stored: StoredTensor | Piece


_RECORDS: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
_NAMES: Names = {
    **{f"torch.{name}": name for name in TORCH_DTYPES},
    **{f"{module}.{name}": Record for module, names in _RECORDS.items() for name in names},
    "torch.Size": Size,
    "builtins.getattr": Member,
}


def read_metadata(path: Path) -> list[Entry]:
    """What a checkpoint holds, in its order.

    Raises:
        SourceError: there is no such file, it is malformed, refers to other objects than DCP's
            metadata, or a tensor's boxes do not cover it exactly once.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
        return _entries(read(data, _NAMES, f"the metadata {path}"))
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a malformed pickle can make it raise anything
        raise SourceError(f"{path} is not the metadata of DCP", found=glimpse(error)) from error


def _entries(metadata: Any) -> list[Entry]:
    pieces = {
        (index["fqn"], _numbers(index.state.get("offset") or ())): _piece(info)
        for index, info in metadata["storage_data"].items()
    }
    keys = metadata["planner_data"] or {}
    return [
        Entry(name, _keys(keys.get(name, (name,))), _stored(name, stored, pieces))
        for name, stored in metadata["state_dict_metadata"].items()
    ]


def _piece(info: Any) -> Piece:
    if info.state.get("transform_descriptors"):
        raise ValueError("values are transformed (compressed or encrypted), which is not supported")
    file, offset, nbytes = info["relative_path"], *_numbers((info["offset"], info["length"]))
    if type(file) is not str:
        raise TypeError("the name of a file is no string")
    return Piece(file, offset, nbytes)


def _stored(
    name: str, stored: Any, pieces: dict[tuple[str, tuple[int, ...]], Piece]
) -> StoredTensor | Piece:
    if type(stored).__name__ == "BytesStorageMetadata":
        return pieces[name, ()]
    dtype, shape = stored["properties"].state[0], _numbers(stored["size"])
    boxes: dict[ShardSpec, Piece] = {}
    for chunk in stored["chunks"]:
        box = ShardSpec(_numbers(chunk["offsets"]), _numbers(chunk["sizes"]))
        ends = [i + n for i, n in zip(box.offset, box.shape, strict=True)]
        if any(end > n for end, n in zip(ends, shape, strict=True)):
            raise ValueError(f"a box of {name} lies outside of it")
        boxes[box] = pieces[name, box.offset]
    if not tile([box for box in boxes if box.size], shape):
        raise ValueError(f"the boxes of {name} do not cover it exactly once")
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"{name} has no dtype")
    return StoredTensor(dtype, shape, boxes)


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a position or length is no number")
    return numbers


def _keys(keys: Any) -> tuple[str | int, ...]:
    if type(keys) is not tuple or not 0 < len(keys) <= tree.MAX_DEPTH:
        raise ValueError("the keys of a value are no tuple, or too many")
    if not all(type(key) in (str, int) for key in keys):
        raise TypeError("a key is neither a string nor a number")
    return keys
