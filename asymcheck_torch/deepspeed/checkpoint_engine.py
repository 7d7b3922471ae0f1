"""`engine.save_checkpoint` and `engine.load_checkpoint` by way of AsymCheck."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    SaveFailedError,
    StoreError,
)
from asymcheck.stores import LocalStore
from asymcheck_torch.deepspeed.engine import Engine
from asymcheck_torch.deepspeed_files import OWN_KEYS
from asymcheck_torch.training import TrainingCheckpointer, attach

_Base: Any = CheckpointEngine  # it ships no types
_MARK = "asymcheck"
_MARK_FILE = "asymcheck.json"  # in the directory of a tag; of one name, so that there is one
_MAX_MARK_NBYTES = 1 << 16
_IMPORT = "What DeepSpeed itself has saved comes in by 'asymcheck import --from deepspeed'"


def use(
    engine: Any,
    *,
    url: str | os.PathLike[str],
    max_to_keep: int | None = None,
    mirror_max_to_keep: int | None = None,
    **options: Any,
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
        max_to_keep, mirror_max_to_keep: how many steps to keep there, and in the mirror if
            there is one; None for all.
        options: what else `attach` takes, but for `every_steps`: the script says what is saved.

    Returns:
        The training checkpointer beneath; close it at the end.

    Raises:
        UnsupportedStateError: the version or a feature of DeepSpeed is not known.
        StoreError: the URL names no store.
    """
    checkpointer = attach(
        engine,
        url=url,
        every_steps=sys.maxsize,
        max_to_keep=max_to_keep,
        mirror_max_to_keep=mirror_max_to_keep,
        **options,
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

    def save(self, client_state: dict[str, Any] | None, directory: Path) -> None:
        """Store the state as it is, and in the tag's directory what it is found by.

        Returns when both are durable. If a rank fails all raise, so none waits for another and
        DeepSpeed leaves `latest` as it is, whatever `on_error` says.

        Args:
            client_state: what DeepSpeed gives out on this rank; None for nothing.
            directory: of the tag.

        Raises:
            SaveFailedError: it cannot be stored, here or on another rank.
            UnsupportedStateError: the client's state holds what no checkpoint can.
            StoreError: the store or the tag's directory cannot be written.
        """
        self._note(client_state)
        checkpointer = self._checkpointer
        checkpointer.step = self._newest = max(checkpointer.step, self._newest + 1)
        self._together(self._store)
        self._together(lambda: self._mark(directory))

    def _note(self, client_state: dict[str, Any] | None) -> None:
        state = self._checkpointer.state
        state.own_more.clear()
        if state.world.rank == 0:
            self._trained.client_state = client_state or {}
        elif client_state is not None:
            state.own_more["client_state"] = client_state

    def _together(self, work: Callable[[], None]) -> None:
        """Have all ranks do it; if one raises, all do."""
        error: Exception | None = None
        try:
            work()
        except Exception as caught:
            error = caught
        _, failed = self._checkpointer.state.world.extremes(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise SaveFailedError(
                "another rank could not save",
                step=self._checkpointer.step,
                hint="Its own error says why; 'latest' is as it was",
            )

    def _store(self) -> None:
        checkpointer = self._checkpointer
        try:
            checkpointer.save_now(late=True)
            checkpointer.wait()
        except AsymCheckError:
            with suppress(AsymCheckError):  # of this save, too: the next one shall not raise it
                checkpointer.wait()
            raise
        try:
            self._attempt_of(checkpointer.step)
        except CheckpointNotFoundError:
            raise SaveFailedError(
                "the step was not committed", step=checkpointer.step, hint="The log says why"
            ) from None

    def _mark(self, directory: Path) -> None:
        if self._checkpointer.state.world.rank == 0:
            step = self._checkpointer.step
            place = {_MARK: {"url": self._url, "step": step, "attempt": self._attempt_of(step)}}
            data = json.dumps(place, indent=1).encode()
            LocalStore(directory).put(_MARK_FILE, memoryview(data))

    def _attempt_of(self, step: int) -> str:
        """The name of the attempt that made a step: no other run has the same."""
        return self._checkpointer.checkpointer.commit_record(step).attempt

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
        found = self._find(load_dir, tag)
        if not found:
            return None, None
        step: int = found["step"]
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
        return found["directory"], self._trained.found.get("client_state", {})

    def _find(self, load_dir: str | os.PathLike[str], tag: str | None) -> dict[str, Any]:
        """What rank 0 finds, on all ranks: they load the same step, or raise the same error."""
        world = self._checkpointer.state.world
        here = json.dumps(self._look_up(load_dir, tag)) if world.rank == 0 else ""
        found: dict[str, Any] = json.loads(world.broadcast_text(here))
        if "problem" in found:
            raise CheckpointNotFoundError(found["problem"])
        return found

    def _look_up(self, load_dir: str | os.PathLike[str], tag: str | None) -> dict[str, Any]:
        """The directory of a tag and the step that it names; empty if there is no `latest`."""
        try:
            if tag is None:
                latest = Path(load_dir) / "latest"
                if not latest.is_file():
                    return {}
                tag = latest.read_text().strip()
            directory = Path(load_dir) / str(tag)
            mark = _read_mark(directory)
            step = int(mark["step"])
            with suppress(CorruptionError, FormatError):  # restoring says what is wrong with it
                self._check_attempt(step, mark, directory)
            return {"directory": str(directory), "step": step}
        except CheckpointNotFoundError as error:
            return {"problem": str(error)}
        except Exception as error:  # the others wait for an answer
            return {"problem": f"the step of tag {tag} in {load_dir} cannot be read: {error!r}"}

    def _check_attempt(self, step: int, mark: dict[str, Any], directory: Path) -> None:
        """Steps of another run have the same numbers."""
        if mark["attempt"] != self._attempt_of(step):
            raise CheckpointNotFoundError(
                f"{directory} was not saved as step {step} of {self._url}",
                hint=f"It was saved with use(engine, url={mark['url']!r})",
            )

    def _schedule(self) -> dict[str, Any] | None:
        schedule = self._engine.lr_scheduler
        return None if schedule is None else schedule.state_dict()


def _read_mark(directory: Path) -> dict[str, Any]:
    """What the small file in a tag's directory says.

    Raises:
        CheckpointNotFoundError: there is none, or DeepSpeed itself has saved the tag after it.
        OSError, ValueError, KeyError: it cannot be read.
    """
    file = directory / _MARK_FILE
    if not file.is_file():
        raise CheckpointNotFoundError(
            f"{directory} is no checkpoint that was saved through AsymCheck", hint=_IMPORT
        )
    saved_ns = file.stat().st_mtime_ns
    if any(other.stat().st_mtime_ns > saved_ns for other in directory.glob("*_states.pt")):
        raise CheckpointNotFoundError(
            f"DeepSpeed itself has saved into {directory} after AsymCheck did", hint=_IMPORT
        )
    return json.loads(file.read_bytes()[:_MAX_MARK_NBYTES])[_MARK]


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
        self._client_state: dict[str, Any] | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""
        self._directory = Path(info.save_dir) / info.tag
        self._made, self._client_state = False, None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory; that of the tag means that a checkpoint is saved, on all ranks.

        Where it cannot be made, writing into it fails, and then on all ranks together; here the
        others would wait for this one.
        """
        self._made |= Path(path) == self._directory
        with suppress(OSError):
            super().makedirs(path, exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """One of the files of the save."""
        if not self._made:
            self._files.save(state_dict, path)
        elif path.endswith("_model_states.pt"):
            self._client_state = {k: v for k, v in state_dict.items() if k not in OWN_KEYS}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Refused: `load_checkpoint` of this engine needs no files of DeepSpeed's."""
        raise StoreError(
            "DeepSpeed wants to read a file of its own", object=path, hint="engine.load_checkpoint"
        )

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return when everything is durable; DeepSpeed writes `latest` after that."""
        if self._made and self._directory is not None:
            self._link.save(self._client_state, self._directory)
        self._directory, self._made = None, False
        return True
