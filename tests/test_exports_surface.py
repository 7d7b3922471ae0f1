"""The public surface: what it is, that it is documented, light, and the same for type checkers."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent

SURFACE = {
    "asymcheck": {
        "Always",
        "AsymCheck",
        "AsymCheckError",
        "AsymCheckNaive",
        "AsymCheckS",
        "Checkpoint",
        "Checkpointer",
        "CompressionPolicy",
        "CostModel",
        "LazyArray",
        "LeafSpec",
        "Never",
        "PendingSave",
        "Selective",
        "ShardSpec",
        "StateView",
        "Store",
        "StoreOptions",
        "Strategy",
        "Synchronous",
        "errors",
        "open_checkpoint",
        "open_store",
    },
    "asymcheck.codecs": {
        "Bf16Codec",
        "Codec",
        "Column",
        "DeltaCodec",
        "ExcpCodec",
        "Int8Codec",
        "JsonValue",
        "PlaneCodec",
        "RawCodec",
        "ReplayCodec",
        "RoundedCodec",
        "TopKCodec",
        "ZstdCodec",
        "codec_by_name",
        "codec_from_manifest",
        "warm_up",
    },
    "asymcheck.stores": {"LocalStore", "Store", "StoreOptions", "open_store"},
    "asymcheck.strategies": {
        "STRATEGIES",
        "AsymCheck",
        "AsymCheckNaive",
        "AsymCheckS",
        "Synchronous",
        "by_name",
    },
    "asymcheck_torch": {"TrainingCheckpointer", "at_forward", "at_update", "attach", "load"},
}
WITHOUT_DOCSTRING = {"JsonValue", "STRATEGIES"}  # plain values

FRAMEWORKS = ("torch", "jax", "flax", "orbax", "deepspeed")
SLOW_TO_IMPORT = ("numba", "tensorstore", "fsspec", "matplotlib", "safetensors", "pytest")
ONLY_FOR_THE_COMMAND = ("absl.app", "asymcheck.cli", "asymcheck.plot", "asymcheck.inspection")


def module(name: str) -> ModuleType:
    if name == "asymcheck_torch":
        pytest.importorskip("torch", reason="torch is not installed")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SURFACE)
def test_public_names(name: str) -> None:
    assert set(module(name).__all__) == SURFACE[name]
    assert len(module(name).__all__) == len(SURFACE[name])
    assert all(hasattr(module(name), public) for public in SURFACE[name])


def public_members(owner: type) -> Iterator[tuple[str, object]]:
    """Methods and properties that a class of ours defines itself."""
    for name, member in vars(owner).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            yield f"{owner.__name__}.{name}", member


@pytest.mark.parametrize("name", SURFACE)
def test_everything_public_is_documented(name: str) -> None:
    undocumented = [] if inspect.getdoc(module(name)) else [name]
    for public in SURFACE[name] - WITHOUT_DOCSTRING:
        found = getattr(module(name), public)
        undocumented += [] if inspect.getdoc(found) else [public]
        if inspect.isclass(found):
            members = public_members(found)
            undocumented += [path for path, member in members if not inspect.getdoc(member)]
    assert undocumented == []


def test_every_error_is_documented_and_one_of_ours() -> None:
    errors = importlib.import_module("asymcheck.errors")
    for name, error in vars(errors).items():
        if inspect.isclass(error):
            assert issubclass(error, errors.AsymCheckError), name
            assert error.__doc__, name


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys, json; print(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import asymcheck", (*FRAMEWORKS, *SLOW_TO_IMPORT, *ONLY_FOR_THE_COMMAND)),
        ("import asymcheck.cli", (*FRAMEWORKS, *SLOW_TO_IMPORT)),
        ("import asymcheck.plot", (*FRAMEWORKS, *SLOW_TO_IMPORT)),
    ],
)
def test_imports_are_light(statement: str, forbidden: tuple[str, ...]) -> None:
    """Time to import is not measured: what makes it long is named instead."""
    assert modules_after(statement).isdisjoint(forbidden)


def test_reading_a_local_run_needs_no_framework(tmp_path: Path) -> None:
    statement = (
        "import asymcheck, numpy\n"
        f"with asymcheck.Checkpointer({str(tmp_path / 'run')!r}) as checkpointer:\n"
        "    checkpointer.save(1, {'x': numpy.ones(3)})\n"
        f"with asymcheck.open_checkpoint({str(tmp_path / 'run')!r}) as checkpoint:\n"
        "    assert checkpoint['x'][1] == 1"
    )
    assert modules_after(statement).isdisjoint((*FRAMEWORKS, "tensorstore", "fsspec"))


def pyright_errors(directory: Path, code: str) -> list[str]:
    """What pyright says of `code`, as a user's file that imports the packages of this tree."""
    pyright = tool("pyright")
    (directory / "user.py").write_text(code)
    settings = {
        "include": ["user.py"],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "reportPrivateImportUsage": "error",
        "reportUnusedImport": False,
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--outputjson"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return [found["message"] for found in json.loads(done.stdout)["generalDiagnostics"]]


def tool(name: str) -> str:
    """A program beside the interpreter, or on the path."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_type_checkers_see_the_same_names(tmp_path: Path) -> None:
    core = {name: public for name, public in SURFACE.items() if name != "asymcheck_torch"}
    code = [f"from {name} import {public}" for name in core for public in sorted(core[name])]
    assert pyright_errors(tmp_path, "\n".join(code)) == []


def test_type_checkers_see_no_other_names(tmp_path: Path) -> None:
    hidden = ["from asymcheck import tree_", "from asymcheck import by_name"]
    assert len(pyright_errors(tmp_path, "\n".join(hidden))) >= 2


def test_dependencies_flow_one_way() -> None:
    done = subprocess.run(
        [tool("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
