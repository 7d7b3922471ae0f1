"""`engine.save_checkpoint` and `engine.load_checkpoint` by way of AsymCheck."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from asymcheck.errors import CheckpointNotFoundError, StoreError
from asymcheck.stores import LocalStore
from asymcheck_torch.deepspeed.engine import Engine
from asymcheck_torch.training import TrainingCheckpointer, attach

_Base: Any = CheckpointEngine  # it ships no types
_MARK = "asymcheck"
_OF_DEEPSPEED = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
        *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler"),
        *("random_ltd", "skipped_steps", "global_steps", "global_samples", "dp_world_size"),
        *("mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    }
)
"""What DeepSpeed itself puts beside the client's state."""


def use(
    engine: Any, *, url: str | os.PathLike[str], max_to_keep: int | None = None, **options: Any
) -> TrainingCheckpointer:
    """Have `engine.save_checkpoint` and `engine.load_checkpoint` go through AsymCheck.

    Scripts stay as they are. `save_checkpoint` returns when the step is durable, and only then
    DeepSpeed moves `latest`. It takes the state as it is, anywhere in the loop: masters and
    moments change in `engine.step()` only, and gradients that have been accumulated belong to no
    checkpoint, as in DeepSpeed. In the tag's directory lies, in the place of the state, a small
    file that names the step; `client_state` is stored with it. `load_checkpoint` loads what was
    saved so, at any number of ranks and any ZeRO stage; what `attach` saves has no tags, and
    `restore` of the result loads it. Training on from an older tag leaves the newer ones as they
    are.

    Args:
        engine: of `deepspeed.initialize`.
        url: where to keep the checkpoints: a path or a URL.
        max_to_keep: how many steps to keep; None for all.
        options: what else `attach` takes, but for `every_steps`: the script says what is saved.

    Returns:
        The training checkpointer beneath; close it at the end.

    Raises:
        UnsupportedStateError: the version or a feature of DeepSpeed is not known.
        StoreError: the URL names no store.
    """
    checkpointer = attach(
        engine, url=url, every_steps=sys.maxsize, max_to_keep=max_to_keep, **options
    )
    link = _Link(engine, checkpointer, os.fspath(url))
    engine.checkpoint_engine = _AsymCheckpointEngine(link)
    engine.load_checkpoint = link.load
    return checkpointer


class _Link:
    """An engine and its checkpointer: one call for a save, one for a load."""

    def __init__(self, engine: Any, checkpointer: TrainingCheckpointer, url: str) -> None:
        self._engine = engine
        self._checkpointer = checkpointer
        self._url = url
        trained = checkpointer.state.trained
        assert isinstance(trained, Engine)
        self._trained = trained
        self._newest = 0  # the highest step that there is
        self._number_on()

    def _number_on(self) -> None:
        """The next step comes after all that there are, whichever is trained on from."""
        steps = self._checkpointer.checkpointer.steps()
        _, newest = self._checkpointer.state.world.extremes(max(steps, default=0))
        self._newest = max(newest, self._newest)

    def save(self, client_state: dict[str, Any]) -> str:
        """Store the state as it is durably; what to find it by, as JSON.

        Raises:
            SaveFailedError: it cannot be stored.
        """
        checkpointer = self._checkpointer
        self._trained.client_state = client_state
        checkpointer.step = self._newest = max(checkpointer.step, self._newest + 1)
        checkpointer.save_now(late=True)
        checkpointer.wait()
        return json.dumps({_MARK: {"url": self._url, "step": checkpointer.step}}, indent=1)

    def load(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As `DeepSpeedEngine.load_checkpoint`; the names of the parameters must always fit.

        Returns:
            The tag's directory and the client state; (None, None) if there is no `latest`.

        Raises:
            CheckpointNotFoundError: AsymCheck has no checkpoint under that tag.
            StateMismatchError: listing every difference; nothing was changed.
            CorruptionError: the checkpoint is damaged.
        """
        if custom_load_fn is not None:
            raise ValueError("AsymCheck reads straight into the engine: no custom_load_fn")
        if tag is None:
            latest = Path(load_dir) / "latest"
            if not latest.is_file():
                return None, None
            tag = latest.read_text().strip()
        directory = Path(load_dir) / str(tag)
        step = _step_in(directory)
        schedule = None if load_lr_scheduler_states else self._schedule()
        weights_only = load_module_only or not load_optimizer_states
        if weights_only:
            self._checkpointer.restore_weights(step)
        else:
            self._checkpointer.restore(step)
        if weights_only and not load_module_only:
            self._trained.apply_engine_state()
        if schedule is not None:
            self._engine.lr_scheduler.load_state_dict(schedule)
        self._number_on()
        return str(directory), self._trained.found.get("client_state", {})

    def _schedule(self) -> dict[str, Any] | None:
        schedule = self._engine.lr_scheduler
        return None if schedule is None else schedule.state_dict()


def _step_in(directory: Path) -> int:
    """The step that the small file in a tag's directory names."""
    for file in sorted(directory.glob("*_model_states.pt")):
        data = file.read_bytes()[: 1 << 16]
        if data.startswith(b"{"):
            return int(json.loads(data)[_MARK]["step"])
    raise CheckpointNotFoundError(
        f"{directory} is no checkpoint that was saved through AsymCheck",
        hint="What DeepSpeed itself has saved comes in by 'asymcheck import --from deepspeed'",
    )


class _AsymCheckpointEngine(_Base):
    """Takes the calls of `save_checkpoint`: create, makedirs, save of each file, commit.

    What DeepSpeed gathers in its dictionaries are live tensors in its own layout, and is passed
    over, but for the client's state. Other files (`save_16bit_model`) are written as they are.
    """

    def __init__(self, link: _Link) -> None:
        super().__init__()
        self.name = "AsymCheck"
        self._link = link
        self._files = TorchCheckpointEngine()
        self._directory: Path | None = None  # of the tag that is being saved
        self._made = False
        self._model_states: Path | None = None
        self._client_state: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""
        self._directory = Path(info.save_dir) / info.tag
        self._made, self._model_states, self._client_state = False, None, {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory; that of the tag means that a checkpoint is saved, on all ranks."""
        super().makedirs(path, exist_ok)
        self._made |= Path(path) == self._directory

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """One of the files of the save."""
        if not self._made:
            self._files.save(state_dict, path)
        elif path.endswith("_model_states.pt"):
            self._model_states = Path(path)
            self._client_state = {k: v for k, v in state_dict.items() if k not in _OF_DEEPSPEED}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Refused: `load_checkpoint` of this engine needs no files of DeepSpeed's."""
        raise StoreError(
            "DeepSpeed wants to read a file of its own", object=path, hint="engine.load_checkpoint"
        )

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return when everything is durable; DeepSpeed writes `latest` after that."""
        if self._made:
            place = self._link.save(self._client_state)
            if self._model_states is not None:
                LocalStore(self._model_states.parent).put(
                    self._model_states.name, memoryview(place.encode())
                )
        self._directory, self._made = None, False
        return True
