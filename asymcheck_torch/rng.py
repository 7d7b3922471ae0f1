"""The random number generators of a process: Python, NumPy, torch on the CPU and on devices."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_log = logging.getLogger("asymcheck")


def capture(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The states of all generators, as copies: plain arrays and numbers, nothing pickled."""
    return {
        "python": _python_state(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": {str(device.index): torch.cuda.get_rng_state(device) for device in devices},
    }


def _python_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def restore(state: dict[str, Any]) -> None:
    """Set all generators. States of CUDA devices that this process lacks are left out, loudly."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for index, cuda_state in state["cuda"].items():
        if int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda_state, int(index))
        else:
            _log.warning("no CUDA device %s here: its RNG state is not restored", index)
