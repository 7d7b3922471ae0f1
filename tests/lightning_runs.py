"""Runs of Lightning's `Trainer.fit`, in this process or in others.

    python lightning_runs.py URL STEP wait|now
    python lightning_runs.py URL OUT

The first trains until the update after STEP is about to begin, waits until STEP is durable or does
not, and is to be killed; the second trains to the end, without checkpoints if URL is "-", and
writes what it comes to into the folder OUT. With RANK in the environment it is one of two.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from rank_processes import await_kill, leave_together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_runs import copied, seed_all

from asymcheck_torch.lightning import AsymCheckCallback
from asymcheck_torch.rng import capture

BATCHES = 10  # of an epoch, on one rank
ACCUMULATED = 2
EPOCHS = 3


class Denoiser(LightningModule):
    """Noise drawn in `training_step`, dropout, batch norm, and a schedule that validation moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 8)
        )

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        (x,) = batch
        return (self.net(x + 0.1 * torch.randn_like(x)) - x).square().mean()

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _index: int) -> None:
        self.log("validation_loss", self.loss(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        schedule = {"scheduler": plateau, "monitor": "validation_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Rows(Logger):
    """Remembers what is logged."""

    name = "rows"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def examples() -> TensorDataset:
    return TensorDataset(torch.randn(3 * BATCHES, 8, generator=torch.Generator().manual_seed(5)))


def shuffled() -> DataLoader[Any]:
    return DataLoader(examples(), 3, shuffle=True)


def trainer_of(*callbacks: Callback, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATED,
        "val_check_interval": 5,
        "log_every_n_steps": 1,
        "logger": Rows(),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if "RANK" in os.environ:
        strategy = DDPStrategy(process_group_backend="gloo")
        defaults |= {"strategy": strategy, "devices": 2, "val_check_interval": 1.0}
    return Trainer(callbacks=list(callbacks), **(defaults | arguments))


def fit(
    *callbacks: Callback,
    make_module: Callable[[], LightningModule] = Denoiser,
    make_loader: Callable[[], Any] = shuffled,
    seed: int = 1,
    **arguments: Any,
) -> dict[str, Any]:
    """Train, with batches in an order that is drawn from the global generators, too."""
    seed_all(seed)
    module = make_module()
    validates = type(module).validation_step is not LightningModule.validation_step
    if validates:
        callbacks = (*callbacks, EarlyStopping("validation_loss", patience=100))
    trainer = trainer_of(*callbacks, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module,
            make_loader(),
            DataLoader(examples(), 10) if validates else None,
        )
    return outcome(trainer)


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that must be the same to the last bit after a run, however often it was interrupted.

    But for "rows": what was logged, which a resumed run has of its own steps only.
    """
    return copied(
        {
            "model": dict(trainer.lightning_module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "callbacks": {
                each.state_key: each.state_dict()
                for each in trainer.callbacks
                if not isinstance(each, AsymCheckCallback)
            },
            "progress": [trainer.global_step, trainer.current_epoch],
            "generators": capture([]),
            "rows": trainer.logger.rows,
        }
    )


class Victim(Callback):
    """Is killed between the backward pass and the update that follows a step."""

    def __init__(self, asymcheck: AsymCheckCallback, step: int, wait: bool) -> None:
        self.asymcheck, self.step, self.wait = asymcheck, step, wait

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == (self.step if self.wait else self.step - 2):
            self.asymcheck.checkpointer.wait()
        if trainer.global_step == self.step:
            await_kill()


def main(url: str, *how: str) -> None:
    torch.set_num_threads(1)
    if len(how) == 1:
        found = fit(*([] if url == "-" else [AsymCheckCallback(url)]))
        torch.save(found, Path(how[0], f"{os.environ['RANK']}.pt"))
        leave_together()
        return
    asymcheck = AsymCheckCallback(url)
    fit(asymcheck, Victim(asymcheck, int(how[0]), how[1] == "wait"))


if __name__ == "__main__":
    main(*sys.argv[1:])
