"""The examples of the JAX adapter run as a user would run them, only shorter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_flax_training_is_killed_resumed_and_goes_on_on_fewer_devices(tmp_path: Path) -> None:
    said = run("train_flax.py", "--steps", "8", "--directory", str(tmp_path))
    assert said.count("yes") == 3 and "NO" not in said


def test_logits_agree_across_frameworks() -> None:
    said = run("cross_framework.py")
    assert "torch -> JAX" in said and "JAX -> torch" in said
