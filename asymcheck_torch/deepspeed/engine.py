"""A DeepSpeed engine as something that is trained: logical parameters, whatever the stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from asymcheck.state import Update
from asymcheck_torch.deepspeed.partitioned import Partitioned
from asymcheck_torch.deepspeed.zero import check_engine, drop_gradients, loss_scaler_of, masters_of
from asymcheck_torch.gradients import Gradients
from asymcheck_torch.matching import Matching
from asymcheck_torch.modules import unwrap
from asymcheck_torch.optimizers import Copy
from asymcheck_torch.stored import Stored
from asymcheck_torch.trained import Live, ModuleAndOptimizers, Trained

_log = logging.getLogger("asymcheck")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_PLAIN = bool | int | float | str | None


@dataclass(slots=True)
class Engine:
    """An engine of `deepspeed.initialize`: what its optimizer trains, and its own counters.

    Attributes:
        client_state: what a script gives with a checkpoint on rank 0.
        found: the engine state of the checkpoint that was restored last.
    """

    engine: Any
    inner: Trained
    client_state: dict[str, Any] = field(default_factory=dict[str, Any])
    found: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, engine: Any, rank: int, size: int, gradients: Gradients | None) -> Engine:
        """How this rank of so many sees the engine, and where it captures gradients, if it does.

        Raises:
            UnsupportedStateError: the version or a feature of DeepSpeed is not known.
        """
        check_engine(engine)
        module, masters = unwrap(engine.module), masters_of(engine.optimizer)
        if masters is None:
            return cls(engine, ModuleAndOptimizers(module, [engine.optimizer], gradients))
        return cls(engine, Partitioned(module, masters, rank, size, gradients=gradients))

    @property
    def module(self) -> nn.Module:
        """The module that was given to DeepSpeed, without the wrapper of `torch.compile`."""
        return unwrap(self.engine.module)

    @property
    def is_updated(self) -> bool:
        """Whether more than the weights counts."""
        return self.inner.is_updated

    def weights(self) -> Engine:
        """See `Trained`."""
        return Engine(self.engine, self.inner.weights(), found=self.found)

    def tensors(self) -> Live:
        """See `Trained`: master weights and moments, not the copies in low precision."""
        return self.inner.tensors()

    def records(self, copy: Copy) -> list[dict[str, Any]]:
        """See `Trained`."""
        return self.inner.records(copy)

    def updates(self, step: int) -> dict[str, Update]:
        """See `Trained`."""
        return self.inner.updates(step)

    def masters(self) -> dict[str, str]:
        """See `Trained`; copies in low precision are not stored."""
        return self.inner.masters()

    def engine_state(self) -> dict[str, Any]:
        """Counters, the loss scale and the schedule."""
        schedule = self.engine.lr_scheduler
        return {
            **{name: getattr(self.engine, name) for name in _COUNTERS},
            "loss_scaler": _plain_members(loss_scaler_of(self.engine.optimizer)),
            "lr_scheduler": None if schedule is None else schedule.state_dict(),
            "client_state": self.client_state,
        }

    def match(self, matching: Matching, stored: Stored) -> Callable[[], None]:
        """See `Trained`. What another kind of run has saved leaves the schedule as it is."""
        apply_inner = self.inner.match(matching, stored)

        def apply() -> None:
            drop_gradients(self.engine)
            apply_inner()
            self.found.clear()
            if stored.engine is not None:
                own = {k: v for k, v in stored.own.items() if k == "client_state"}
                self.found.update(stored.engine | own)
            if self.is_updated and self.found:
                self.apply_engine_state()
            elif self.is_updated:
                self._start_at(matching.checkpoint.step)
            self._accumulate_anew()

        return apply

    def refresh(self) -> None:
        """See `Trained`."""
        self.inner.refresh()

    def apply_engine_state(self) -> None:
        """Give the engine the counters, the loss scale and the schedule that were restored."""
        for name in self.found.keys() & set(_COUNTERS):
            setattr(self.engine, name, self.found[name])
        self._accumulate_anew()
        scaler, saved = loss_scaler_of(self.engine.optimizer), self.found.get("loss_scaler", {})
        if saved.keys() == _plain_members(scaler).keys():
            for name, value in saved.items():
                setattr(scaler, name, value)
        schedule, here = self.found.get("lr_scheduler"), self.engine.lr_scheduler
        if schedule is not None and here is not None:
            here.load_state_dict(schedule)
        elif schedule is not None or here is not None:
            where = "checkpoint" if here is None else "engine"
            _log.warning("only the %s has a learning rate schedule: it is not restored", where)

    def _accumulate_anew(self) -> None:
        """The next micro batch is the first of an update, however many this engine takes for one.

        DeepSpeed counts skipped updates in `global_steps`, too.
        """
        updates = self.engine.global_steps
        self.engine.micro_steps = updates * self.engine.gradient_accumulation_steps()

    def _start_at(self, step: int) -> None:
        self.engine.global_steps = step
        self.engine.skipped_steps = 0
        self.engine.global_samples = step * self.engine.train_batch_size()
        if self.engine.lr_scheduler is not None:
            _log.warning("step %d was not saved by DeepSpeed: the schedule is not restored", step)

    def hook_updates(
        self, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """See `Trained`."""
        return self.inner.hook_updates(before, after)


def _plain_members(scaler: Any) -> dict[str, Any]:
    members = {} if scaler is None else vars(scaler)
    return {name: value for name, value in members.items() if isinstance(value, _PLAIN)}
