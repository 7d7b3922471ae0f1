"""Lightning: a callback that checkpoints every step and resumes `Trainer.fit` at the next batch.

The loops of Lightning 2.6 are read and set here, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from itertools import chain, islice
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from asymcheck.errors import AsymCheckError, StateMismatchError, UnsupportedStateError
from asymcheck_torch import rng
from asymcheck_torch.position import Position
from asymcheck_torch.tensors import cuda_devices
from asymcheck_torch.training import TrainingCheckpointer, attach

_log = logging.getLogger("asymcheck")


class AsymCheckCallback(Callback):
    """Checkpoints a `Trainer.fit` at every step, and goes on from the newest checkpoint.

        trainer = Trainer(callbacks=[AsymCheckCallback(url="runs/a")], ...)
        trainer.fit(module, loader)

    Module, optimizers, schedules, precision (gradient scaler), data module, callbacks, generators
    and loops are bit for bit what they were. The batches of the epoch that were used are drawn
    again and passed over; loaders with `state_dict()` and `load_state_dict()` are told their
    position instead. Metrics that are logged as a mean over the epoch begin anew, and
    `on_save_checkpoint` hooks are not called: keep more state in `extra_state` or in
    `get_extra_state()` of a module.

    List it before callbacks that change the weights as training ends (averages).

    A step is a batch in which optimizers made an update, and what follows it until the next batch:
    schedules, evaluation. A run that raises keeps all steps that had ended.

    Args:
        url: where to keep the checkpoints: a path or a URL.
        every_steps: checkpoint steps that are multiples of this.
        extra_state: a mapping of names to more objects with `state_dict()` and
            `load_state_dict()`.
        **options: the others of `asymcheck_torch.attach`.

    Attributes:
        checkpointer: the `TrainingCheckpointer` while the trainer fits, and after.
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
        self._options = options | {"every_steps": every_steps}
        self._extra_state = dict(extra_state or {})
        self._run: _Run | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and restore if there is a checkpoint.

        Raises:
            UnsupportedStateError: this kind of training is not supported; names it.
            StateMismatchError: there is a checkpoint here and one in `fit(ckpt_path=...)`.
            what `asymcheck_torch.attach` and `TrainingCheckpointer.restore` raise.
        """
        self._close()
        _check_supported(trainer, pl_module)
        self._run = _Run(trainer, self._extra_state, url=self._url, **self._options)
        self.checkpointer = self._run.checkpointer
        try:
            self._run.restore()
        except BaseException:
            self._close()
            raise

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The data is set up: go to where it was."""
        self._of_run().start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins."""
        self._of_run().begin_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch is drawn; if the one before ended a step, all about it is done."""
        self._of_run().begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next batch is not drawn yet."""
        self._of_run().end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until all is durable, and let go of module and optimizers."""
        self._of_run().position.end_training()
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish what is under way; the exception goes on."""
        try:
            self._close()
        except AsymCheckError:
            _log.exception("closing after %r", exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go, where there was nothing to train."""
        self._close()

    def _of_run(self) -> _Run:
        if self._run is None:
            raise RuntimeError("AsymCheckCallback was added after training had begun")
        return self._run

    def _close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()


def _check_supported(trainer: Trainer, module: LightningModule) -> None:
    if not lightning.__version__.startswith("2.6."):
        raise UnsupportedStateError(
            f"the loops of Lightning {lightning.__version__} are not known",
            hint="Install lightning 2.6",
        )
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UnsupportedStateError(
            f"{type(strategy).__name__} is not supported",
            hint="Attach to the model in a loop of your own: asymcheck_torch.attach",
        )
    if module._compiler_ctx is not None:
        raise UnsupportedStateError(
            "a LightningModule that is compiled as a whole is not supported",
            hint="Compile the modules that it consists of",
        )


class _Run:
    """One `fit`: what of the trainer belongs to a checkpoint, and how it gets it back."""

    def __init__(self, trainer: Any, extra_state: dict[str, Any], **options: Any) -> None:
        module = trainer.lightning_module
        self.position = Position(module, lambda: trainer.global_step, self._loop_state)
        self._trainer = trainer
        self._loop = trainer.fit_loop
        self._loader_states: list[Any] = []  # as the last batch ended
        self._has_iterator = True  # the first epoch's is made before the epoch begins
        # The hooks come before those of `attach`.
        self._hooks = [each.register_step_pre_hook(_run_closure) for each in trainer.optimizers]
        self.checkpointer = attach(
            trainer.strategy.model,
            [*trainer.optimizers, self.position.loop_step],
            extra_state=extra_state | self._extra_state(),
            **options,
        )

    def _extra_state(self) -> dict[str, Any]:
        trainer = self._trainer
        schedulers = {
            f"lightning.lr_scheduler{index}": config.scheduler
            for index, config in enumerate(trainer.lr_scheduler_configs)
        }
        data = {} if trainer.datamodule is None else {"lightning.datamodule": trainer.datamodule}
        precision = {"lightning.precision": trainer.precision_plugin}
        return {"lightning": self.position} | schedulers | data | precision

    def close(self) -> None:
        """Let go of the trainer."""
        for hook in self._hooks:
            hook.remove()
        self.checkpointer.close()

    # -- restoring -------------------------------------------------------------------------

    def restore(self) -> None:
        """Restore, if there is a checkpoint; data is then set up under the generators of now."""
        generators = rng.capture(cuda_devices(self._trainer.lightning_module.parameters()))
        if self.checkpointer.restore() == 0:
            self.position.begin_epoch()
            return
        rng.restore(generators)
        if self._trainer.ckpt_path is not None:
            raise StateMismatchError(
                f"there is a checkpoint here, and {self._trainer.ckpt_path} is to be restored",
                step=self.checkpointer.step,
                hint="Call fit() without ckpt_path, or choose another URL",
            )
        self._loop.load_state_dict(self.position.loop["fit_loop"])
        states = self.position.loop["callbacks"]
        for callback in self._trainer.callbacks:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])

    def start(self) -> None:
        """The data is set up, the iterator over it made."""
        loaders = self._loop._combined_loader.flattened
        stateful = [loader for loader in loaders if isinstance(loader, _Stateful)]
        if stateful and len(stateful) < len(loaders):
            raise UnsupportedStateError("some of the loaders have a state_dict(), and some do not")
        if not self.position.is_restored:
            self.checkpointer.step = self._trainer.global_step  # not 0 after fit(ckpt_path=...)
        elif stateful:
            self.position.begin_epoch()
        else:
            self._pass_over_batches(loaders)

    def _pass_over_batches(self, loaders: list[Any]) -> None:
        """Make the iterator of the interrupted run, and draw what that has drawn."""
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        fetcher: Any = self._loop._data_fetcher
        if not isinstance(fetcher, _PrefetchDataFetcher):
            raise UnsupportedStateError("a training_step(dataloader_iter) cannot be resumed")
        for loader in loaders:
            _set_sampler_epoch(loader, self._loop.epoch_progress.current.processed)
        self.position.begin_epoch()
        iter(fetcher)
        progress = self._loop.epoch_loop.batch_progress.current
        used = progress.completed if self._loop.restarting else 0
        for _ in range(used):
            next(fetcher)
        fetcher.fetched -= used  # the loop adds them itself
        # Samplers draw their seed with the first batch; a restarted loop draws others before.
        iterator: Any = fetcher.iterator
        rest = iter(iterator.__next__, None)  # without a sentinel it would begin again
        fetcher.iterator = chain(list(islice(rest, 1)), rest)

    # -- the course of the loops -----------------------------------------------------------

    def begin_epoch(self) -> None:
        """An epoch begins, and its iterator is made unless there is one."""
        if not self._has_iterator:
            self.position.begin_epoch()
        self._has_iterator = False

    def begin_batch(self) -> None:
        """A batch is drawn."""
        if self.position.is_restored:
            # A restarted loop counts its last batch again, and passes over schedules of the epoch.
            state = self.position.loop["fit_loop"]["epoch_loop.state_dict"]
            self._loop.epoch_loop.on_load_checkpoint(state)
            self._loop._restarting = False
        self._has_iterator = False
        self.position.begin_batch()

    def end_batch(self) -> None:
        """A batch has trained, and the next one is not drawn yet."""
        self._loader_states = self._loop.on_save_checkpoint().get("combined_loader", [])

    def _loop_state(self) -> dict[str, Any]:
        """The loops as a batch begins, their loaders as the batch before ended."""
        loaders = {"combined_loader": self._loader_states} if self._loader_states else {}
        states = {each.state_key: each.state_dict() for each in self._trainer.callbacks}
        return {
            "fit_loop": self._loop.state_dict() | {"state_dict": loaders},
            "callbacks": {key: state for key, state in states.items() if state},
        }


def _run_closure(_optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the closure that Lightning gives to `step()`, before the step begins.

    The closure is the forward and backward pass, and a step begins with waiting for the capture.
    """
    closure = kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        first = [closure()]
    return args, kwargs | {"closure": lambda: first.pop() if first else closure()}
