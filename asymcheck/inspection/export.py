"""`asymcheck export`: a step as one file, or a directory, that other programs read.

Checkpoints of other libraries are directories; adapters bring their formats (see `plugins`). The
formats of this module are files: they hold every leaf under its path, tied leaves once, bytes as
uint8, scalars as 0-d arrays. What the format cannot say itself goes into notes, a JSON
object with the members

- `step`, `metadata`: of the checkpoint;
- `structure`: how leaves, numbers and strings make up the state, by the grammar of docs/format.md;
- `aliases`: further path -> path of the same leaf;
- `dtypes`: path -> dtype of the leaves that are stored as another dtype: complex ones as pairs of
  floats (a last dimension of 2), others as unsigned integers of the same width.

safetensors takes bfloat16 and the common float8 as they are, but not complex numbers; the notes
are the string `asymcheck` of its metadata. An .npz must load in a NumPy without
ml_dtypes, so bfloat16 and float8 are integers there: `a.view(ml_dtypes.bfloat16)` brings them
back; the notes are the array `~asymcheck` of UTF-8 bytes, a name that no leaf of a state has.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.errors import StoreError, UnsupportedStateError
from asymcheck.inspection import plugins
from asymcheck.inspection.optional import load_optional
from asymcheck.inspection.progress import Progress
from asymcheck.inspection.text import size
from asymcheck.reader import Checkpoint

FORMATS = ("safetensors", "npz")
NOTES = "~asymcheck"

_REAL = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64"}
)
_NATIVE: Mapping[str, frozenset[str]] = {
    "safetensors": _REAL | {"bfloat16", "float8_e4m3fn", "float8_e5m2"},
    "npz": _REAL | {"complex64", "complex128"},
}
_SAFETENSORS_RESERVED = "__metadata__"


@dataclass(frozen=True)
class Exported:
    """The file or directory that was written."""

    output: str
    format: str
    step: int
    leaves: int
    nbytes: int
    reinterpreted: dict[str, str]

    def text(self) -> list[str]:
        """What was written, and which leaves are integers in it."""
        lines = [f"{self.output}: step {self.step}, {self.leaves} leaves, {size(self.nbytes)}"]
        if self.reinterpreted:
            lines.append(
                f"{len(self.reinterpreted)} leaves have another dtype in it "
                f"({', '.join(sorted(set(self.reinterpreted.values())))}): the notes name them"
            )
        return lines


def formats() -> list[str]:
    """The formats that can be exported to."""
    return [*FORMATS, *plugins.names("exporters")]


def export(
    checkpoint: Checkpoint, format: str, output: str | os.PathLike[str], progress: bool | None
) -> Exported:
    """Write an open step to a file or directory, which appears when it is whole.

    A file that is there is replaced, a directory is not. An .npz takes the memory of its largest
    leaf; everything else is put together in memory.

    Raises:
        ValueError: there is no such format.
        MissingLibraryError: the format's library is not installed.
        UnsupportedStateError: the format cannot hold a leaf, or reserves its name.
        CorruptionError: stored bytes are missing or wrong; nothing is written.
        StoreError: the store cannot be read, or the output cannot be written.
    """
    write = _writer(format)
    target = Path(output)
    if format not in FORMATS and target.exists():
        raise StoreError(f"{target} exists already", hint="Remove it, or name another output")
    nbytes = sum(spec.nbytes for spec in checkpoint.leaves.values())
    with Progress(f"exporting step {checkpoint.step}", nbytes, progress) as done:
        _atomically(target, lambda path: write(checkpoint, path, done.add))
    return Exported(
        str(target),
        format,
        checkpoint.step,
        len(checkpoint),
        sum(file.stat().st_size for file in _files(target)),
        _reinterpreted(checkpoint, format),
    )


def _writer(format: str) -> plugins.Exporter:
    own = {"safetensors": _write_safetensors, "npz": _write_npz}.get(format)
    if own is None and format not in formats():
        raise ValueError(f"no format {format!r} to export to; one of {', '.join(formats())}")
    return own or plugins.load("exporters", format)


def _atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Write in a directory beside the target, which takes whatever a failure leaves with it."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    written = temporary / target.name
    try:
        temporary.mkdir()
        write(written)
        for path in [*_files(written), *_directories(written)]:
            _sync(path)
        written.replace(target)
        _sync(target.absolute().parent)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    """A file itself, or all files below a directory."""
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def _directories(path: Path) -> list[Path]:
    """A directory and all below it."""
    return [p for p in (path, *path.rglob("*")) if p.is_dir()]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def notes(checkpoint: Checkpoint, format: str) -> dict[str, Any]:
    """What the file says besides its arrays."""
    return {
        "step": checkpoint.step,
        "metadata": checkpoint.metadata,
        "structure": checkpoint.structure,
        "aliases": dict(checkpoint.aliases),
        "dtypes": _reinterpreted(checkpoint, format),
    }


def _reinterpreted(checkpoint: Checkpoint, format: str) -> dict[str, str]:
    if format not in _NATIVE:
        return {}
    return {p: s.dtype for p, s in checkpoint.leaves.items() if s.dtype not in _NATIVE[format]}


def _array(checkpoint: Checkpoint, path: str, reinterpreted: Mapping[str, str]) -> NDArray[Any]:
    """A leaf, as integers or pairs of floats if it is among the reinterpreted."""
    array = np.asarray(checkpoint[path][...])
    if path not in reinterpreted:
        return array
    if array.dtype.kind == "c":
        return array[..., None].view(f"f{array.itemsize // 2}")
    return array.view(f"u{array.itemsize}")


def _write_safetensors(checkpoint: Checkpoint, path: Path, done: Callable[[int], None]) -> None:
    library = load_optional("safetensors.numpy", "export", "to export to safetensors")
    _refuse(checkpoint, _SAFETENSORS_RESERVED)
    about = notes(checkpoint, "safetensors")
    arrays: dict[str, NDArray[Any]] = {}
    for leaf in checkpoint:
        arrays[leaf] = _array(checkpoint, leaf, about["dtypes"])
        done(arrays[leaf].nbytes)
    try:
        library.save_file(arrays, path, {"asymcheck": json.dumps(about)})
    except load_optional("safetensors", "export", "to export").SafetensorError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def _write_npz(checkpoint: Checkpoint, path: Path, done: Callable[[int], None]) -> None:
    _refuse(checkpoint, NOTES)
    about = notes(checkpoint, "npz")
    text = json.dumps(about).encode()
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _add(archive, NOTES, np.frombuffer(text, np.uint8))
        for leaf in checkpoint:
            array = _array(checkpoint, leaf, about["dtypes"])
            _add(archive, leaf, array)
            done(array.nbytes)


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same step gives the same file
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _refuse(checkpoint: Checkpoint, reserved: str) -> None:
    if reserved in checkpoint.leaves:
        raise UnsupportedStateError("the format reserves this name", leaf=reserved)
