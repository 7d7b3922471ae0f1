"""AsymCheckHandler with Orbax on gs:// paths: real Orbax and gcsfs, a stand-in for the server."""

from __future__ import annotations

import pytest

pytest.importorskip("gcsfs", reason="gcsfs is missing: pip install 'asymcheck[dev]'")

from jax_processes import TIMEOUT_S, run, start
from servers.gcs import GcsServer

import asymcheck


@pytest.fixture
def directory(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a manager; gcsfs and Google's own client find the server without credentials."""
    gcs_server.token = None
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    return f"gs://{gcs_server.bucket}/my runs/jax"


def item(directory: str, step: int) -> str:
    """The URL of a step's item."""
    return f"{directory.replace(' ', '%20')}/{step}/default"


@pytest.mark.parametrize("handler", [[], ["--orbax"]], ids=["asymcheck", "orbax"])
def test_steps_are_kept_deleted_and_found_again(directory: str, handler: list[str]) -> None:
    (said,) = run("keep_two", directory, 1, 2, *handler)
    assert "steps [1, 2]" in said
    (said,) = run("keep_two", directory, 1, 2, *handler)
    assert "steps [4, 5]" in said


def test_two_processes_save_and_other_numbers_restore(
    directory: str, gcs_server: GcsServer
) -> None:
    run("save", directory, 2, 2)
    with asymcheck.open_checkpoint(item(directory, 3)) as checkpoint:
        assert checkpoint.step == 3 and len(checkpoint.chain) == 1  # of itself alone
        assert len(checkpoint.chain[0].manifests) == 2
        checkpoint.verify()
    steps = {name.split("/")[2] for name in gcs_server.contents() if "/default/data/" in name}
    assert steps == {"2", "3"}  # Orbax has deleted the others
    run("restore", directory, 1, 4)
    run("restore", directory, 2, 2)


def test_a_step_that_orbax_has_not_named_is_none_and_is_saved_again(
    directory: str, gcs_server: GcsServer
) -> None:
    (process,) = start("unnamed", directory, 1, 2)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 9, said[-3000:]
    durable = [name for name in gcs_server.contents() if "/1/default/commits/" in name]
    assert durable, "the step was not even durable"
    (said,) = run("keep_two", directory, 1, 2)  # goes on behind step 0
    assert "steps [2, 3]" in said
