"""Hugging Face `Trainer`: a callback that checkpoints every step and resumes at the next batch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from asymcheck.checkpointer import Checkpointer
from asymcheck.errors import StateMismatchError, UnsupportedStateError
from asymcheck.reader import Checkpoint
from asymcheck_torch.accelerate import attach_prepared
from asymcheck_torch.position import Position
from asymcheck_torch.training import TrainingCheckpointer

_NAME = "trainer"  # of the position in the extra state
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AsymCheckCallback(TrainerCallback):
    """Checkpoints a `Trainer`'s run at every step.

        asymcheck = AsymCheckCallback(url="runs/a")
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[asymcheck])
        trainer.train(resume_from_checkpoint=asymcheck.resume_point())

    Model, optimizer, schedule, gradient scaler, generators and the trainer's state with its log
    are bit for bit what they were. The data position follows from the trainer's state: `Trainer`
    passes over the batches that were used, which is exact as long as a data set gives the same
    items again. Losses that are logged as a mean over several steps begin anew, and the state of
    other callbacks is not restored, as with `Trainer`'s own checkpoints.

    Args:
        url: where to keep the checkpoints: a path or a URL.
        every_steps: checkpoint the trainer's global steps that are multiples of this.
        extra_state: a mapping of names to more objects with `state_dict()` and
            `load_state_dict()`.
        **options: the others of `asymcheck_torch.attach`.

    Attributes:
        checkpointer: the `TrainingCheckpointer` while the trainer trains, and after.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        every_steps: int = 1,
        extra_state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.checkpointer: TrainingCheckpointer | None = None
        self._url = url
        self._options: dict[str, Any] = options | {"every_steps": every_steps}
        self._extra_state = dict(extra_state or {})
        self._position: Position | None = None
        self._resume_point: _ResumePoint | None = None

    def resume_point(self) -> str | None:
        """What to give to `trainer.train(resume_from_checkpoint=...)`: None to begin.

        A temporary directory that tells `Trainer` where to go on; all else is restored by this
        callback, without which `Trainer` refuses it. Every byte of the step is verified; damaged
        ones are passed over, loudly.

        Raises:
            CheckpointNotFoundError: no step is whole.
            StateMismatchError: the newest one was not written by this callback.
            StoreError: the URL names no store, or it failed.
        """
        self.close()
        with Checkpointer(self._url, mirror=self._options.get("mirror")) as steps:
            if steps.latest_step() is None:
                return None
            self._resume_point = _ResumePoint(steps.restore_with(_verified_state))
        return self._resume_point.path

    def close(self) -> None:
        """Finish what is under way after a run that raised; a run that ends does it itself.

        The last update is checkpointed if the next batch had begun.

        Raises:
            SaveFailedError: a checkpoint failed (with on_error="raise").
        """
        if self._resume_point is not None:
            self._resume_point.close()
            self._resume_point = None
        position, self._position = self._position, None
        if position is not None and self.checkpointer is not None:
            self.checkpointer.close()

    # -- events ----------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        """Attach, and restore if there is a checkpoint.

        Raises:
            UnsupportedStateError: this kind of training is not supported; names it.
            StateMismatchError: there is a checkpoint, and `Trainer` does not go on from it.
            what `asymcheck_torch.attach` and `TrainingCheckpointer.restore` raise.
        """
        self.close()
        _check_supported(args, optimizer)
        self._position = Position(model, lambda: state.global_step, _StateLines(state))
        self.checkpointer = attach_prepared(
            model,
            [optimizer, self._position.loop_step],
            url=self._url,
            process_group=dist.group.WORLD if args.world_size > 1 else None,
            extra_state={
                **self._extra_state,
                _NAME: self._position,
                f"{_NAME}.lr_scheduler": lr_scheduler,
            },
            **self._options,
        )
        try:
            self._restore(state.global_step)
        except BaseException:
            self.close()
            raise

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """The iterator over the data is about to be made."""
        self._of_run().begin_epoch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batches of a step are drawn; the step before is done with."""
        self._of_run().begin_batch()

    def on_log(self, *_: Any, logs: Mapping[str, Any], **__: Any) -> None:
        """After the last log the best model may be loaded: capture the last step before."""
        if "train_runtime" in logs and self.checkpointer is not None:
            self._of_run().end_training()
            self.checkpointer.wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Wait until all is durable, and let go of model and optimizer."""
        self.close()

    # -- the rest --------------------------------------------------------------------------

    def _of_run(self) -> Position:
        if self._position is None:
            raise RuntimeError("AsymCheckCallback was added after training had begun")
        return self._position

    def _restore(self, global_step: int) -> None:
        assert self.checkpointer is not None
        found = self.checkpointer.restore()
        if found == 0:
            self.checkpointer.step = global_step
        elif found != global_step:
            raise StateMismatchError(
                "Trainer does not go on from the newest checkpoint",
                expected=f"global step {found}",
                found=global_step,
                hint="Call trainer.train(resume_from_checkpoint=callback.resume_point()), or "
                "choose another URL to begin anew",
            )


def _check_supported(args: TrainingArguments, optimizer: AcceleratedOptimizer) -> None:
    state: Any = optimizer.accelerator_state
    if state.distributed_type not in _SUPPORTED:
        raise UnsupportedStateError(
            f"a Trainer with {state.distributed_type.value} is not supported",
            hint="Attach to the model in a loop of your own: asymcheck_torch.attach",
        )
    if args.n_gpu > 1:
        raise UnsupportedStateError(
            "a Trainer with several devices in one process is not supported",
            hint="Start one process for each device, with torchrun",
        )
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UnsupportedStateError(
            "a Trainer that compiles the model itself is not supported",
            hint="Compile submodules before you give the model to Trainer",
        )


class _StateLines:
    """A `TrainerState` as lines of JSON: all but the log, then the entries of the log.

    The log only grows, so each entry is encoded once.
    """

    def __init__(self, state: TrainerState) -> None:
        self._state = state
        self._log = bytearray()
        self._encoded = 0

    def __call__(self) -> NDArray[np.uint8]:
        history = self._state.log_history
        for entry in history[self._encoded :]:
            self._log += b"\n" + json.dumps(entry).encode()
        self._encoded = len(history)
        names = [field.name for field in fields(TrainerState) if field.name != "log_history"]
        rest = {name: getattr(self._state, name) for name in names}
        return np.frombuffer(json.dumps(rest).encode() + self._log, np.uint8)


def _state_of(lines: NDArray[np.uint8]) -> dict[str, Any]:
    """The `TrainerState` of such lines, as a dictionary."""
    rest, *log = lines.tobytes().split(b"\n")
    return json.loads(rest) | {"log_history": [json.loads(entry) for entry in log]}


def _verified_state(checkpoint: Checkpoint) -> dict[str, Any]:
    path = f"ranks/0/extra/{_NAME}/loop"
    if path not in checkpoint:
        raise StateMismatchError(
            "the checkpoint is not one of AsymCheckCallback",
            step=checkpoint.step,
            leaf=path,
            hint="Choose another URL to begin anew",
        )
    checkpoint.verify()
    return _state_of(np.asarray(checkpoint[path]))


class _ResumePoint:
    """A directory that passes for a checkpoint of `Trainer` and holds nothing but its state.

    `Trainer` loads weights before it asks the callbacks and generators after. So it finds a file
    without weights, and the warning about that is kept back; and a file of generators that cannot
    be read, which fails a training where no callback has removed it.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._directory = TemporaryDirectory(prefix="asymcheck-resume-")
        self.path = self._directory.name
        save_file({}, Path(self.path, "model.safetensors"), {"format": "pt"})
        Path(self.path, "trainer_state.json").write_text(json.dumps(state))
        for name in ["rng_state.pth", *(f"rng_state_{rank}.pth" for rank in range(_ranks()))]:
            Path(self.path, name).write_text("AsymCheckCallback is not among the callbacks")
        logging.getLogger("transformers.trainer").addFilter(self._keep_back)

    @staticmethod
    def _keep_back(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("There were missing keys in the checkpoint")

    def close(self) -> None:
        logging.getLogger("transformers.trainer").removeFilter(self._keep_back)
        self._directory.cleanup()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
