"""Every code block of the README and of docs/ runs as it stands there.

`python` blocks run in the order of the file, in one namespace and one temporary directory. Of
`bash` and `console` blocks the lines that call `asymcheck` run, in between; other programs are not
ours to run. A run that such a command names and no block has made is made first, with the steps
that the file's commands name. A comment on the line before a block changes that:

    <!-- test: skip REASON -->          do not run it, because
    <!-- test: fresh -->                 an empty namespace and directory from here on
    <!-- test: fixture NAME -->          enter a context of `FIXTURES` in the directory first; it
                                         lasts to the end of the file
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from sample_run import state_at, write_run
from servers.gcs import GcsServer
from servers.s3 import MissingServerError, S3Server

from asymcheck.codecs import _CODECS, codec_by_name
from asymcheck.commit import MAX_CHAIN, MAX_COMMIT_NBYTES, committed_steps
from asymcheck.index import MAX_CORNERS
from asymcheck.manifest import (
    MAX_BLOCK_NBYTES,
    MAX_LEAF_NBYTES,
    MAX_MANIFEST_NBYTES,
    MAX_RANK,
    MAX_STEP,
    MAX_TEXT,
    MAX_WRITERS,
)
from asymcheck.policy import Never
from asymcheck.state import DTYPES
from asymcheck.stores import Store, StoreOptions, open_store
from asymcheck.stores.base import MAX_KEY_LENGTH
from asymcheck.tree import MAX_DEPTH

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def made(*arguments: Any, **options: Any) -> AbstractContextManager[object]:
    """A run, written in advance."""
    write_run(*arguments, **options)
    return nullcontext()


@contextmanager
def gcs_server() -> Iterator[None]:
    """A stand-in for Google Cloud Storage with the bucket `my-bucket`."""
    with GcsServer(bucket="my-bucket") as server, patch.dict(os.environ, server.environment):
        yield
        assert server.violations == []


@contextmanager
def s3_server() -> Iterator[None]:
    """moto's S3 server at `S3_ENDPOINT`, with the bucket `my-bucket`."""
    try:
        with S3Server() as server:
            request = urllib.request.Request(f"{server.url}/my-bucket", method="PUT")
            urllib.request.urlopen(request, timeout=60).close()
            with patch.dict(os.environ, server.environment | {"S3_ENDPOINT": server.url}):
                yield
    except MissingServerError as error:
        pytest.skip(str(error))


FIXTURES: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "run": lambda: made("runs/a"),
    "raw_run": lambda: made("runs/a", policy=Never()),
    "gcs_server": gcs_server,
    "s3_server": s3_server,
}
SERVED = {"gcs_server": "gs://my-bucket/", "s3_server": "s3://my-bucket/"}
OPTIONAL = ("torch", "transformers", "accelerate", "lightning")

_FENCE = re.compile(r"```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- test: (skip|fresh|fixture)(?: (.*?))? -->\s*\Z")
_ELSEWHERE = re.compile(r"(?:file:///|gs://|s3://|hdfs://)\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of code."""

    language: str
    code: str
    line: int
    marker: str | None
    argument: str | None


def blocks_of(text: str) -> Iterator[Block]:
    for fence in _FENCE.finditer(text):
        marker = _MARKER.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start(2)) + 1
        yield Block(fence[1], fence[2], line, *(marker.groups() if marker else (None, None)))


def commands_of(block: Block) -> list[list[str]]:
    """The calls of `asymcheck` in a shell block, each without what follows in a pipe."""
    if block.language not in ("bash", "console", "sh", "shell"):
        return []
    lines = (re.sub(r"^\$ ", "", line) for line in block.code.replace("\\\n", "").splitlines())
    calls = (shlex.split(line, comments=True) for line in lines if line.startswith("asymcheck "))
    return [
        call[: next((i for i, a in enumerate(call) if a in ("|", ">")), None)] for call in calls
    ]


def steps_named(commands: list[list[str]]) -> tuple[int, ...]:
    """Numbers that stand alone or behind --step in commands."""
    words = (re.sub(r"^--step=", "", word) for command in commands for word in command)
    return tuple(sorted({int(word) for word in words if word.isdecimal()})) or (10, 20)


def run_command(command: list[str], steps: tuple[int, ...], place: str) -> None:
    command = [os.path.expandvars(word) for word in command]
    if len(command) > 2 and not command[2].startswith("-") and not is_made(command[2]):
        write_run(command[2], steps)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    allowed = (0, 1) if command[1] == "diff" else (0,)
    assert done.returncode in allowed, f"{place}: {shlex.join(command)}: {done.stderr}"


def is_made(run: str) -> bool:
    """Whether there is a run of that name, or (for `import`) a file."""
    return bool(committed_steps(open_store(run))) if "://" in run else Path(run).exists()


def run_document(document: Path, directory: Path) -> dict[str, Any]:
    """Run all blocks; the namespace at the end."""
    with ExitStack() as fixtures:
        return run_blocks(document, directory, fixtures)


def run_blocks(document: Path, directory: Path, fixtures: ExitStack) -> dict[str, Any]:
    blocks = list(blocks_of(document.read_text()))
    steps = steps_named([command for block in blocks for command in commands_of(block)])
    namespace: dict[str, Any] = {}
    served: list[str] = []
    for block in blocks:
        place = f"{document.name}:{block.line}"
        if block.marker == "skip":
            assert block.argument, f"{place}: a block that does not run must say why"
            continue
        if block.marker == "fresh":
            namespace = {}
            directory = directory / "fresh"
            directory.mkdir()
            os.chdir(directory)
        if block.marker == "fixture":
            fixtures.enter_context(FIXTURES[block.argument or ""]())
            served.append(SERVED.get(block.argument or "", "nowhere"))
        if block.language == "python":
            check_places(block, served, place)
            run_python(block, namespace, document, place)
        for command in commands_of(block):
            run_command(command, steps, place)
    return namespace


def check_places(block: Block, served: list[str], place: str) -> None:
    for url in _ELSEWHERE.findall(block.code):
        assert url.startswith(tuple(served)), f"{place}: {url} is not in a temporary place"


def run_python(block: Block, namespace: dict[str, Any], document: Path, place: str) -> None:
    for name in OPTIONAL:
        if name in block.code:
            pytest.importorskip(name, reason=f"{place} needs {name}")
    code = compile("\n" * (block.line - 1) + block.code, str(document), "exec")
    exec(code, namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_document(document, tmp_path)


def test_the_reader_of_the_specification_reads_all_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read = run_document(ROOT / "docs" / "format.md", tmp_path)["read_raw_leaf"]
    state = state_at(20)
    for path, expected in (
        ("params/weight", state["params"]["weight"]),
        ("params/tied", state["params"]["weight"]),
        ("optimizer/count", state["optimizer"]["count"]),
        ("optimizer/phase", state["optimizer"]["phase"]),
        ("optimizer/mask", state["optimizer"]["mask"]),
    ):
        found = read(Path("runs/a"), 20, path)
        assert (found.dtype, found.shape) == (expected.dtype, np.shape(expected))
        assert found.tobytes() == np.asarray(expected).tobytes()
    with pytest.raises(AssertionError, match="no such leaf"):
        read(Path("runs/a"), 20, "params/none")
    pack = next(Path("runs/a/data").glob(f"{20:016}-*/*.pack"))
    pack.write_bytes(bytes(pack.stat().st_size))
    with pytest.raises(AssertionError):
        read(Path("runs/a"), 20, "params/weight")


def section(number: int) -> str:
    """A section of the specification."""
    text = (ROOT / "docs" / "format.md").read_text()
    return re.split(r"^## \d+\. ", text, flags=re.MULTILINE)[number]


def table_rows(text: str) -> list[list[str]]:
    rows = [
        line.strip("|").split(" | ")
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_specification_lists_the_dtypes_of_the_code() -> None:
    found = {
        name: int(nbytes)
        for nbytes, names in table_rows(section(8))[1:]
        for name in re.findall(r"`(\w+)`", names)
    }
    assert found == {name: dtype.itemsize for name, dtype in DTYPES.items()}


def test_the_specification_lists_the_codecs_of_the_code() -> None:
    rows = [row for row in table_rows(section(9)) if len(row) == 4][1:]
    ids = [row[0].strip("`") for row in rows][: len(_CODECS)]  # formulas have four columns, too
    assert sorted(ids) == sorted(_CODECS)
    for row in table_rows(section(9))[1 : len(ids) + 1]:
        codec = codec_by_name(row[0].strip("`"))
        parameters = re.findall(r"`(\w+)`", row[1])
        assert sorted(set(parameters)) == sorted(codec.params)
        assert (row[2], row[3]) == (_yes(codec.needs_base), _yes(codec.lossy))
    assert [id for id in ids if codec_by_name(id).joint] == ["replay"]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def test_the_specification_has_the_limits_of_the_code() -> None:
    limits = dict(row for row in table_rows(section(17)) if len(row) == 2)
    power = "2^{}".format
    assert limits == {
        "what": "limit",
        "step, and every *integer*": f"{power((MAX_STEP + 1).bit_length() - 1)} − 1",
        "commit record": f"{power(MAX_COMMIT_NBYTES.bit_length() - 1)} bytes",
        "manifest": f"{power(MAX_MANIFEST_NBYTES.bit_length() - 1)} bytes",
        "lease, abort": "2^12, 2^16 bytes",
        "writers": power(MAX_WRITERS.bit_length() - 1),
        "depth of a chain": str(MAX_CHAIN),
        "nesting of the structure": str(MAX_DEPTH),
        "dimensions of a leaf": str(MAX_RANK),
        "boxes of a leaf, times 2 for every dimension in which they cut it": power(
            MAX_CORNERS.bit_length() - 1
        ),
        "bytes of a leaf, taking lengths of 0 as 1": power(MAX_LEAF_NBYTES.bit_length() - 1),
        "decoded bytes of a block": power(MAX_BLOCK_NBYTES.bit_length() - 1),
        "payload of a block": "2 × decoded bytes + 4096",
        "path, alias": f"{MAX_TEXT} characters",
        "codec id; key": f"64; {MAX_KEY_LENGTH} characters",
    }


def stores_section(name: str) -> str:
    """A section of docs/stores.md."""
    text = (ROOT / "docs" / "stores.md").read_text()
    return re.split(rf"^## {name}$", text, flags=re.MULTILINE)[1].partition("\n## ")[0]


# Nothing is asked of any server here.
KINDS: Mapping[str, Callable[[], Store]] = {
    "`file://`": lambda: open_store("runs/a"),
    "`memory://`": lambda: open_store("memory://a"),
    "`tensorstore+file://`": lambda: open_store("tensorstore+file:///a"),
    "`hdfs://`": lambda: open_store("hdfs://name:8020/a"),
    "`webhdfs://`": lambda: open_store("webhdfs://name:9870/a"),
    "`gs://`": lambda: open_store("gs://my-bucket"),
    "`s3://`": lambda: open_store("s3://my-bucket"),
}


def test_the_guarantees_are_those_of_the_code() -> None:
    pytest.importorskip("hdfs_native", reason="pip install asymcheck[hdfs]")
    rows = {
        kind: row[1:]
        for row in table_rows(stores_section("What they promise"))[1:]
        for kind in row[0].split(", ")
    }
    assert rows.keys() == KINDS.keys()
    for kind, opened in KINDS.items():
        with closing(opened()) as store:
            promised = dataclasses.asdict(store.guarantees)
        del promised["concurrency"], promised["range_nbytes"]  # see "Options"
        assert rows[kind] == [_yes(p) if isinstance(p, bool) else p for p in promised.values()]


def test_the_options_are_those_of_the_code() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_rows(stores_section("Options"))[1:]}
    fields = {field.name: field.default for field in dataclasses.fields(StoreOptions)}
    assert rows.keys() == fields.keys()
    for name in ("retries", "timeout_s", "concurrency"):
        assert float(rows[name]) == fields[name]


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        anchors = {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, f"{document.name}: {target}"
            elif "://" not in target:
                path = document.parent / target.partition("#")[0]
                assert path.exists(), f"{document.name}: {target}"


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -- the runner itself -------------------------------------------------------------------------


def test_blocks_share_a_namespace_until_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "x.md"
    document.write_text(
        "```python\na = 1\n```\n```python\nb = a + 1\n```\n"
        "<!-- test: skip it would fail -->\n```python\n1 / 0\n```\n"
        "```text\nnot code\n```\n"
        "<!-- test: fresh -->\n```python\nassert 'a' not in dir()\nc = 3\n```\n"
    )
    namespace = run_document(document, tmp_path)
    assert "a" not in namespace
    assert namespace["c"] == 3


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("<!-- test: skip -->\n```python\n1 / 0\n```\n", AssertionError),
        ("```python\nurl = 'file:///runs/a'\n```\n", AssertionError),
        ("```python\nurl = 's3://my-bucket/a'\n```\n", AssertionError),
        ("```bash\nasymcheck ls runs/b --nonsense\n```\n", AssertionError),
        ("<!-- test: fixture nonsense -->\n```python\n1\n```\n", KeyError),
    ],
)
def test_what_fails_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "x.md"
    document.write_text(text)
    with pytest.raises(error):
        run_document(document, tmp_path)


def test_commands_find_the_run_and_the_steps_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "x.md"
    document.write_text(
        "```bash\nbash long.sh  # not ours\nasymcheck ls runs/b | head -1  # comment\n```\n"
        "```console\n$ asymcheck diff runs/b 3 4\nstep 3 to step 4\n"
        "$ asymcheck show runs/b --step=4 \\\n    params/weight\n```\n"
    )
    run_document(document, tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs/b/commits").iterdir()) == [
        f"{step:016d}.json" for step in (3, 4)
    ]
