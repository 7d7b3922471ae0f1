"""Hugging Face Accelerate: attach to what `accelerator.prepare` returned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from asymcheck_torch.training import TrainingCheckpointer, attach


def attach_prepared(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    url: str | os.PathLike[str],
    extra_state: Mapping[str, Any] | None = None,
    **options: Any,
) -> TrainingCheckpointer:
    """`asymcheck_torch.attach` for a prepared model and its prepared optimizers.

    A call of `optimizer.step()` that only accumulates gradients is no step, nor is one that the
    gradient scaler skips. The scaler's state belongs to the checkpoint.

    Args:
        model: as `prepare` returned it: bare, compiled, or wrapped by DDP.
        optimizer: one or several, in the order in which the loop steps them.
        url: where to keep the checkpoints: a path or a URL.
        extra_state: a mapping of names to objects with `state_dict()` and `load_state_dict()`,
            prepared schedulers for example.
        **options: the others of `asymcheck_torch.attach`.

    Raises:
        what `asymcheck_torch.attach` raises.
    """
    prepared = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    wrapped = [each for each in prepared if isinstance(each, AcceleratedOptimizer)]
    scaler = next((each.scaler for each in wrapped if each.scaler is not None), None)
    return attach(
        model,
        [each.optimizer if isinstance(each, AcceleratedOptimizer) else each for each in prepared],
        url=url,
        extra_state=({} if scaler is None else {"grad_scaler": scaler}) | dict(extra_state or {}),
        **options,
    )
