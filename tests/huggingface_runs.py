"""Runs of Hugging Face's `Trainer` and of Accelerate, in this process or in others.

    python huggingface_runs.py trainer|loop URL STEP wait|now
    python huggingface_runs.py trainer URL OUT

The first trains until the update after STEP is about to begin, waits until STEP is durable or does
not, and is to be killed; the second trains to the end, without checkpoints if URL is "-", and
writes what it comes to into the folder OUT. Each rank does (in torchrun's environment).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from rank_processes import await_kill, leave_together
from torch.utils.data import DataLoader, Dataset
from torch_runs import copied
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from asymcheck_torch import TrainingCheckpointer
from asymcheck_torch.accelerate import attach_prepared
from asymcheck_torch.huggingface import AsymCheckCallback
from asymcheck_torch.rng import capture

BATCHES = 10  # of an epoch, on one rank
ACCUMULATED = 2
EPOCHS = 2
_OF_TIME = ("runtime", "per_second")


class Tokens(Dataset):
    """Sequences of random tokens, the same every time."""

    def __init__(self, count: int = 3 * BATCHES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def small_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def trainer_of(
    output: Path, *callbacks: TrainerCallback, data: Dataset[Any] | None = None, **arguments: Any
) -> Trainer:
    """With dropout, accumulation, a schedule, and evaluations that use random numbers too."""
    transformers.set_seed(1)
    defaults: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "disable_tqdm": True,
    }
    return Trainer(
        model=small_gpt2(),
        args=TrainingArguments(str(output), **(defaults | arguments)),
        train_dataset=data or Tokens(),
        eval_dataset=Tokens(6),
        callbacks=list(callbacks),
    )


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that must be the same to the last bit after a run, however often it was interrupted."""
    log = [
        {key: value for key, value in entry.items() if not key.endswith(_OF_TIME)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return copied(
        {
            "model": dict(trainer.model.state_dict()),
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "log": log,
            "generators": capture([]),
        }
    )


class Victim(TrainerCallback):
    """Is killed between the backward pass and the update that follows a step."""

    def __init__(self, asymcheck: AsymCheckCallback, step: int, wait: bool) -> None:
        self.asymcheck, self.step, self.wait = asymcheck, step, wait

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        die(self.asymcheck.checkpointer, state.global_step, self.step, self.wait)


def die(checkpointer: TrainingCheckpointer, now: int, step: int, wait: bool) -> None:
    """After `step`, once it is durable; or once the step before the last is."""
    if now == (step if wait else step - 2):
        checkpointer.wait()
    if now == step:
        await_kill()


def train_loop(url: str | None, kill_at: int | None = None, wait: bool = True) -> dict[str, Any]:
    """A loop of Accelerate; what it comes to, with the losses by update."""
    for shared in (GradientState, AcceleratorState):
        shared._reset_state()  # of trainers in this process
    accelerate.utils.set_seed(1)
    accelerator = accelerate.Accelerator(
        gradient_accumulation_steps=ACCUMULATED,
        cpu=True,
        dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = small_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    # The loader's own generator: to make its iterator anew disturbs nothing.
    loader = DataLoader(Tokens(), 3, shuffle=True, generator=torch.Generator().manual_seed(2))
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    checkpointer, first = None, 0
    if url is not None:
        checkpointer = attach_prepared(
            model, optimizer, url=url, extra_state={"schedule": schedule}
        )
        first = checkpointer.restore()
    losses: dict[int, list[float]] = {}
    updates = BATCHES // ACCUMULATED
    done = first
    for epoch in range(first // updates, EPOCHS):
        loader.set_epoch(epoch)
        used = ACCUMULATED * (first % updates) if epoch == first // updates else 0
        for batch in accelerator.skip_first_batches(loader, used):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if checkpointer is not None and kill_at is not None:
                    die(checkpointer, checkpointer.step, kill_at, wait)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.setdefault(done, []).append(loss.item())
            done += accelerator.sync_gradients
    if checkpointer is not None:
        assert checkpointer.step == EPOCHS * updates
        checkpointer.close()
    return copied(
        {
            "model": dict(model.state_dict()),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generators": capture([]),
            "losses": losses,
        }
    )


def main(kind: str, url: str, *how: str) -> None:
    torch.set_num_threads(1)
    if len(how) == 1:
        out = Path(how[0], f"{os.environ['RANK']}.pt")
        given = [] if url == "-" else [AsymCheckCallback(url)]
        trainer = trainer_of(out.parent, *given)
        trainer.train(given[0].resume_point() if given else None)
        torch.save(outcome(trainer), out)
        leave_together()
        return
    step, wait = int(how[0]), how[1] == "wait"
    if kind == "loop":
        train_loop(url, step, wait)
        return
    asymcheck = AsymCheckCallback(url)
    victim = Victim(asymcheck, step, wait)
    trainer = trainer_of(Path(url, "output"), asymcheck, victim)
    trainer.train(resume_from_checkpoint=asymcheck.resume_point())


if __name__ == "__main__":
    main(*sys.argv[1:])
