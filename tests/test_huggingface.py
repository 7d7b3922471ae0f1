"""Hugging Face `Trainer` and Accelerate: killed runs go on as if nothing had been."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import huggingface_runs  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from huggingface_runs import (  # noqa: E402
    ACCUMULATED,
    BATCHES,
    EPOCHS,
    outcome,
    train_loop,
    trainer_of,
)
from rank_processes import run_and_kill, run_to_the_end  # noqa: E402
from torch_runs import differences, mlp  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck import open_checkpoint  # noqa: E402
from asymcheck.commit import committed_steps  # noqa: E402
from asymcheck.errors import StateMismatchError, UnsupportedStateError  # noqa: E402
from asymcheck.stores import LocalStore  # noqa: E402
from asymcheck_torch.accelerate import attach_prepared  # noqa: E402
from asymcheck_torch.huggingface import AsymCheckCallback  # noqa: E402

UPDATES = BATCHES // ACCUMULATED  # of an epoch
LAST = EPOCHS * UPDATES


def resume(url: Path, output: Path, **arguments: Any) -> Any:
    asymcheck = AsymCheckCallback(url, every_steps=arguments.pop("every_steps", 1))
    trainer = trainer_of(output, asymcheck, **arguments)
    trainer.train(resume_from_checkpoint=asymcheck.resume_point())
    return trainer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the other processes: sums depend on the number of threads, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = trainer_of(tmp_path_factory.mktemp("output"))
    trainer.train()
    return outcome(trainer)


# -- Trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "when"),
    [(3, "wait"), (UPDATES, "wait"), (UPDATES + 2, "now")],
    ids=["in an epoch", "at the end of an epoch", "in the middle of a save"],
)
def test_a_killed_trainer_goes_on_bit_for_bit(
    step: int, when: str, uninterrupted: dict[str, Any], tmp_path: Path
):
    url = tmp_path / "run"
    run_and_kill("huggingface_runs.py", "trainer", url, step, when)
    newest = max(committed_steps(LocalStore(url)))
    assert newest == step if when == "wait" else newest >= step - 2
    trainer = resume(url, tmp_path / "output")
    assert trainer._initial_global_step == newest
    assert differences(outcome(trainer), uninterrupted) == []
    assert committed_steps(LocalStore(url))[-1] == LAST


def test_two_ranks_that_are_killed_go_on_bit_for_bit(tmp_path: Path):
    script = ("huggingface_runs.py", "trainer")
    run_and_kill(*script, tmp_path / "run", 2, "wait", ranks=2)
    assert committed_steps(LocalStore(tmp_path / "run"))[-1] == 2
    for out, url in (("resumed", tmp_path / "run"), ("uninterrupted", "-")):
        (tmp_path / out).mkdir()
        run_to_the_end(*script, url, tmp_path / out, ranks=2)
    for rank in ("0.pt", "1.pt"):
        found = torch.load(tmp_path / "resumed" / rank, weights_only=False)
        expected = torch.load(tmp_path / "uninterrupted" / rank, weights_only=False)
        assert differences(found, expected) == []


class Stop(transformers.TrainerCallback):
    """Raises at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError(self.step)


def interrupted(
    url: Path, output: Path, event: str, step: int, every_steps: int = 1, **arguments: Any
) -> AsymCheckCallback:
    """A run that raised and is closed."""
    asymcheck = AsymCheckCallback(url, every_steps=every_steps)
    trainer = trainer_of(output, asymcheck, Stop(event, step), **arguments)
    with pytest.raises(InterruptedError):
        trainer.train(resume_from_checkpoint=asymcheck.resume_point())
    asymcheck.close()
    return asymcheck


@pytest.mark.parametrize(("event", "newest"), [("on_pre_optimizer_step", 4), ("on_evaluate", 3)])
def test_a_run_that_raises_keeps_whole_steps(
    event: str, newest: int, uninterrupted: dict[str, Any], tmp_path: Path
):
    """A step ends where the next batch begins, after the evaluation."""
    url = tmp_path / "run"
    asymcheck = interrupted(url, tmp_path / "output", event, 4)
    assert committed_steps(LocalStore(url))[-1] == newest
    trainer = trainer_of(tmp_path / "output", asymcheck)  # the same callback again
    point = asymcheck.resume_point()
    trainer.train(resume_from_checkpoint=point)
    assert differences(outcome(trainer), uninterrupted) == []
    assert point is not None
    assert not Path(point).exists()


def test_every_few_steps(uninterrupted: dict[str, Any], tmp_path: Path):
    url = tmp_path / "run"
    interrupted(url, tmp_path / "output", "on_step_end", 8, every_steps=3)
    assert committed_steps(LocalStore(url)) == [3, 6]
    trainer = resume(url, tmp_path / "output", every_steps=3)
    assert differences(outcome(trainer), uninterrupted) == []


def test_random_numbers_decide_the_order_of_the_data(tmp_path: Path):
    """Samplers that draw from the global generators, and epochs that end within an update."""
    unusual = {
        "data": huggingface_runs.Tokens(25),  # 9 batches, the last one smaller
        "accelerator_config": {"use_seedable_sampler": False},
    }
    reference = trainer_of(tmp_path, **unusual)
    reference.train()
    url = tmp_path / "run"
    interrupted(url, tmp_path, "on_pre_optimizer_step", 7, **unusual)
    assert differences(outcome(resume(url, tmp_path, **unusual)), outcome(reference)) == []


def test_a_damaged_step_is_passed_over(uninterrupted: dict[str, Any], tmp_path: Path):
    url = tmp_path / "run"
    interrupted(url, tmp_path / "output", "on_pre_optimizer_step", 7)
    for pack in (url / "data").glob(f"{7:016d}-*/*.pack"):
        pack.write_bytes(bytes(pack.stat().st_size))
    trainer = resume(url, tmp_path / "output")
    assert trainer._initial_global_step == 6
    assert differences(outcome(trainer), uninterrupted) == []
    with open_checkpoint(url, 7) as checkpoint:
        checkpoint.verify()


def test_a_lost_disk_costs_nothing_that_the_mirror_has(
    uninterrupted: dict[str, Any], tmp_path: Path
):
    url, mirror = tmp_path / "run", tmp_path / "mirror"
    asymcheck = AsymCheckCallback(url, mirror=mirror)
    trainer = trainer_of(tmp_path / "output", asymcheck, Stop("on_pre_optimizer_step", 7))
    with pytest.raises(InterruptedError):
        trainer.train()
    asymcheck.close()
    assert committed_steps(LocalStore(mirror))[-1] == 7
    shutil.rmtree(url)
    asymcheck = AsymCheckCallback(url, mirror=mirror)
    trainer = trainer_of(tmp_path / "output", asymcheck)
    trainer.train(resume_from_checkpoint=asymcheck.resume_point())
    assert trainer._initial_global_step == 7
    assert differences(outcome(trainer), uninterrupted) == []
    assert committed_steps(LocalStore(url))[-1] == committed_steps(LocalStore(mirror))[-1] == LAST


def test_the_best_model_does_not_get_into_the_last_checkpoint(tmp_path: Path):
    url = tmp_path / "run"
    asymcheck = AsymCheckCallback(url)
    trainer = trainer_of(
        tmp_path / "output",
        asymcheck,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first one
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = trainer.model.state_dict()["transformer.wte.weight"]
    with open_checkpoint(url) as checkpoint:
        assert checkpoint.step == LAST
        last = np.asarray(checkpoint["params/transformer.wte.weight"])
    assert not np.array_equal(last, best.numpy())


def test_a_finished_run_is_not_trained_any_further(uninterrupted: dict[str, Any], tmp_path: Path):
    url = tmp_path / "run"
    for _ in range(3):
        trainer = resume(url, tmp_path / "output")
        assert committed_steps(LocalStore(url))[-1] == LAST
        found = dict(trainer.model.state_dict())
        assert differences(found, uninterrupted["model"]) == []


def test_steps_are_numbered_on_from_a_checkpoint_of_the_trainer(tmp_path: Path):
    output = tmp_path / "output"
    trainer_of(output, save_strategy="steps", save_steps=7).train()
    url = tmp_path / "run"
    trainer = trainer_of(output, AsymCheckCallback(url))
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-7"))
    assert committed_steps(LocalStore(url)) == [8, 9, 10]


# -- what is refused ---------------------------------------------------------------------------


def test_a_checkpoint_is_not_overwritten_by_a_run_that_begins_anew(tmp_path: Path):
    url = tmp_path / "run"
    resume(url, tmp_path / "output")
    trainer = trainer_of(tmp_path / "output", AsymCheckCallback(url))
    with pytest.raises(StateMismatchError, match=r"expected global step 10; found 0.*resume_point"):
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_the_resume_point_is_worth_nothing_without_the_callback(tmp_path: Path):
    url = tmp_path / "run"
    interrupted(url, tmp_path / "output", "on_pre_optimizer_step", 3)
    asymcheck = AsymCheckCallback(url)
    trainer = trainer_of(tmp_path / "output")
    with pytest.raises(pickle.UnpicklingError):
        trainer.train(resume_from_checkpoint=asymcheck.resume_point())
    assert trainer.state.global_step == 3


def test_checkpoints_of_something_else(tmp_path: Path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with asymcheck_torch.attach(model, optimizer, url=tmp_path):
        model(torch.ones(1, 12)).sum().backward()
        optimizer.step()
    with pytest.raises(StateMismatchError, match="not one of AsymCheckCallback"):
        AsymCheckCallback(tmp_path).resume_point()


def test_nothing_to_resume_from(tmp_path: Path):
    assert AsymCheckCallback(tmp_path / "none").resume_point() is None


def test_compiled_by_the_trainer(tmp_path: Path):
    trainer = trainer_of(
        tmp_path / "output", AsymCheckCallback(tmp_path / "run"), torch_compile=True
    )
    with pytest.raises(UnsupportedStateError, match="compiles"):
        trainer.train()


@pytest.mark.parametrize(("kind", "devices"), [("FSDP", 1), ("DEEPSPEED", 1), ("NO", 2)])
def test_other_ways_to_distribute(kind: str, devices: int, tmp_path: Path):
    state = SimpleNamespace(distributed_type=accelerate.DistributedType[kind])
    optimizer = SimpleNamespace(accelerator_state=state)
    with pytest.raises(UnsupportedStateError, match="not supported"):
        AsymCheckCallback(tmp_path).on_train_begin(
            SimpleNamespace(n_gpu=devices),
            None,
            None,
            model=mlp(),
            optimizer=optimizer,
            lr_scheduler=None,
        )


# -- Accelerate --------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "when"), [(3, "wait"), (UPDATES, "wait"), (UPDATES + 2, "now")])
def test_a_killed_loop_goes_on_bit_for_bit(step: int, when: str, tmp_path: Path):
    url = tmp_path / "run"
    run_and_kill("huggingface_runs.py", "loop", url, step, when)
    newest = max(committed_steps(LocalStore(url)))
    assert newest == step if when == "wait" else step - 2 <= newest <= step
    expected = train_loop(None)
    found = train_loop(str(url))
    losses = expected.pop("losses")
    assert found.pop("losses") == {k: v for k, v in losses.items() if k >= newest}
    assert differences(found, expected) == []


def test_only_updates_are_steps(tmp_path: Path):
    """Neither calls of step() that accumulate, nor updates that the scaler skips."""
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    with attach_prepared(model, optimizer, url=tmp_path) as checkpointer:
        for call in range(8):
            with accelerator.accumulate(model):
                factor = float("inf") if call == 3 else 1.0
                scaler.scale(model(torch.ones(1, 12)).sum() * factor).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert checkpointer.step == 3
        assert scaler.get_scale() == 32.0
    assert committed_steps(LocalStore(tmp_path)) == [1, 2, 3]
    again = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(again.parameters(), lr=1.0), scaler=scaler)
    with attach_prepared(again, optimizer, url=tmp_path) as checkpointer:
        assert checkpointer.restore() == 3
    assert scaler.get_scale() == 32.0
    assert differences(again.state_dict(), model.state_dict()) == []


def test_attach_says_what_to_do_with_a_prepared_optimizer(tmp_path: Path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(UnsupportedStateError, match="that it wraps"):
        asymcheck_torch.attach(model, optimizer, url=tmp_path)


# -- the rest ----------------------------------------------------------------------------------


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    code = "import sys, asymcheck_torch; print({'transformers', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
