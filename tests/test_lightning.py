"""Lightning: a killed `Trainer.fit` goes on as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import Callback, LightningDataModule, LightningModule  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import FSDPStrategy  # noqa: E402
from lightning_runs import (  # noqa: E402
    ACCUMULATED,
    BATCHES,
    EPOCHS,
    Denoiser,
    examples,
    fit,
    shuffled,
    trainer_of,
)
from rank_processes import run_and_kill, run_to_the_end  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset  # noqa: E402
from torch_runs import differences  # noqa: E402

from asymcheck.commit import committed_steps  # noqa: E402
from asymcheck.errors import StateMismatchError, UnsupportedStateError  # noqa: E402
from asymcheck.partition import Phase  # noqa: E402
from asymcheck.stores import LocalStore  # noqa: E402
from asymcheck_torch.lightning import AsymCheckCallback  # noqa: E402

UPDATES = BATCHES // ACCUMULATED  # of an epoch
LAST = EPOCHS * UPDATES


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other processes: sums depend on the number of threads, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(one_thread: None) -> dict[str, Any]:
    return fit()


class Stop(Callback):
    """Raises at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise InterruptedError(self.step)


def interrupted(url: Path, event: str, step: int, every_steps: int = 1, **arguments: Any) -> None:
    with pytest.raises(InterruptedError):
        fit(AsymCheckCallback(url, every_steps=every_steps), Stop(event, step), **arguments)


def check_resumed(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """It came to the same, and logged the same from where it went on."""
    rows = len(found["rows"])
    assert 0 < rows < len(expected["rows"])
    assert differences(found, expected | {"rows": expected["rows"][-rows:]}) == []


@pytest.mark.parametrize(
    ("step", "when"),
    [(UPDATES + 3, "wait"), (UPDATES, "wait"), (UPDATES + 2, "now")],
    ids=["in an epoch", "at the end of an epoch", "in the middle of a save"],
)
def test_a_killed_fit_goes_on_bit_for_bit(
    step: int, when: str, uninterrupted: dict[str, Any], tmp_path: Path
):
    run_and_kill("lightning_runs.py", tmp_path, step, when)
    newest = committed_steps(LocalStore(tmp_path))[-1]
    assert newest == step if when == "wait" else step - 2 <= newest <= step
    check_resumed(fit(AsymCheckCallback(tmp_path), seed=99), uninterrupted)
    assert committed_steps(LocalStore(tmp_path))[-1] == LAST


def test_two_ranks_that_are_killed_go_on_bit_for_bit(tmp_path: Path):
    run_and_kill("lightning_runs.py", tmp_path / "run", 3, "wait", ranks=2)
    assert committed_steps(LocalStore(tmp_path / "run"))[-1] == 3
    for out, url in (("resumed", tmp_path / "run"), ("uninterrupted", "-")):
        (tmp_path / out).mkdir()
        run_to_the_end("lightning_runs.py", url, tmp_path / out, ranks=2)
    for rank in ("0.pt", "1.pt"):
        found = torch.load(tmp_path / "resumed" / rank, weights_only=False)
        expected = torch.load(tmp_path / "uninterrupted" / rank, weights_only=False)
        check_resumed(found, expected)


def test_the_callback_changes_nothing(uninterrupted: dict[str, Any], tmp_path: Path):
    modules = []

    def make_module() -> LightningModule:
        modules.append(Denoiser())
        return modules[0]

    found = fit(AsymCheckCallback(tmp_path), make_module=make_module)
    assert differences(found, uninterrupted) == []
    assert not modules[0].trainer.optimizers[0]._optimizer_step_pre_hooks


def test_copies_have_the_windows_of_forward_and_backward(tmp_path: Path):
    """Lightning runs both within the optimizer's step, before which everything must be copied."""
    asymcheck = AsymCheckCallback(tmp_path)
    fit(asymcheck)
    windows = asymcheck.checkpointer.checkpointer.profile.windows()
    assert {window.phase for window in windows} == {Phase.FORWARD, Phase.BACKWARD}


@pytest.mark.parametrize(
    ("event", "newest"),
    [("on_before_optimizer_step", 4), ("on_validation_start", 4), ("on_train_batch_end", 6)],
)
def test_a_run_that_raises_keeps_whole_steps(
    event: str, newest: int, uninterrupted: dict[str, Any], tmp_path: Path
):
    """A step ends where the next batch begins."""
    step = {"on_before_optimizer_step": 4, "on_validation_start": 5}.get(event, 7)
    interrupted(tmp_path, event, step)
    assert committed_steps(LocalStore(tmp_path))[-1] == newest
    check_resumed(fit(AsymCheckCallback(tmp_path), seed=99), uninterrupted)


def test_every_few_steps(uninterrupted: dict[str, Any], tmp_path: Path):
    interrupted(tmp_path, "on_before_optimizer_step", 8, every_steps=3)
    assert committed_steps(LocalStore(tmp_path)) == [3, 6]
    check_resumed(fit(AsymCheckCallback(tmp_path, every_steps=3), seed=99), uninterrupted)


class Gradients(Denoiser):
    """Validates with gradients, in training mode."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.train()
        with torch.enable_grad():
            super().validation_step(batch, index)


def test_validation_begins_no_checkpoint(tmp_path: Path):
    expected = fit(make_module=Gradients)
    interrupted(tmp_path, "on_before_optimizer_step", UPDATES, make_module=Gradients)
    found = fit(AsymCheckCallback(tmp_path), seed=99, make_module=Gradients)
    check_resumed(found, expected)


def test_limited_by_steps(tmp_path: Path):
    expected = fit(max_epochs=-1, max_steps=12)
    interrupted(tmp_path, "on_before_optimizer_step", 7, max_epochs=-1, max_steps=12)
    found = fit(AsymCheckCallback(tmp_path), seed=99, max_epochs=-1, max_steps=12)
    check_resumed(found, expected)


def test_trained_further_than_it_was_meant_to(uninterrupted: dict[str, Any], tmp_path: Path):
    fit(AsymCheckCallback(tmp_path), max_epochs=EPOCHS - 1)
    check_resumed(fit(AsymCheckCallback(tmp_path), seed=99), uninterrupted)


def test_a_finished_run_is_not_trained_any_further(uninterrupted: dict[str, Any], tmp_path: Path):
    fit(AsymCheckCallback(tmp_path))
    for _ in range(2):
        found = fit(AsymCheckCallback(tmp_path), seed=99)
        assert found["rows"] == []
        assert found["progress"] == [LAST, EPOCHS]
        assert differences(found["model"], uninterrupted["model"]) == []
        assert committed_steps(LocalStore(tmp_path))[-1] == LAST


# -- data --------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Every access draws random numbers, in a process of the loader."""

    def __len__(self) -> int:
        return 3 * BATCHES

    def __getitem__(self, index: int) -> list[Any]:
        return [index + torch.randn(8)]


class Stream(IterableDataset):
    """Of no known length, in a random order."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(3 * BATCHES):
            yield examples()[index]


class Stateful:
    """A loader that keeps its own position: an endless stream, cut into epochs."""

    def __init__(self) -> None:
        self.drawn = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        for _ in range(BATCHES - self.drawn % BATCHES):
            self.drawn += 1
            yield [torch.randn(3, 8, generator=torch.Generator().manual_seed(self.drawn))]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


LOADERS = {
    "workers": lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), 3),
    "stateful": Stateful,
    "several": lambda: [shuffled(), shuffled()],
}


class Trains(Denoiser):
    """Without validation, on the first of several loaders' batches."""

    validation_step = LightningModule.validation_step

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return super().training_step(batch[0] if isinstance(batch[0], list) else batch, index)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("step", [UPDATES, UPDATES + 2])
def test_loaders(loader: str, step: int, tmp_path: Path):
    unusual = {
        "make_module": Trains,
        "make_loader": LOADERS[loader],
        "val_check_interval": 1.0,
    }
    expected = fit(**unusual)
    interrupted(tmp_path, "on_before_optimizer_step", step, **unusual)
    check_resumed(fit(AsymCheckCallback(tmp_path), seed=99, **unusual), expected)


def test_a_mixture_of_loaders_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedStateError, match="some of the loaders"):
        fit(
            AsymCheckCallback(tmp_path),
            make_module=Trains,
            make_loader=lambda: [shuffled(), Stateful()],
            val_check_interval=1.0,
        )


# -- what else belongs to a run ----------------------------------------------------------------


class Adversaries(Trains):
    """Manual optimization of two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, index: int) -> None:
        of_net, of_critic = self.optimizers()
        (x,) = batch
        of_critic.zero_grad()
        (self.critic(self.net(x).detach()).mean() - self.critic(x).mean()).backward()
        of_critic.step()
        of_net.zero_grad()
        loss = -self.critic(self.net(x + torch.randn_like(x))).mean()
        loss.backward()
        of_net.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        net = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        critic = torch.optim.RMSprop(self.critic.parameters(), lr=1e-3)
        return [net, critic], [torch.optim.lr_scheduler.ExponentialLR(net, 0.9)]


class TwoUpdates(Adversaries):
    """Optimizers step several times in a batch."""

    def training_step(self, batch: Any, index: int) -> None:
        super().training_step(batch, index)
        super().training_step(batch, index)


class Lbfgs(Trains):
    """An optimizer that runs the closure several times in a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Clipped(Trains):
    """Gradients are changed between the closure and the update."""

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, 0.01, "norm")


@pytest.mark.parametrize("make_module", [Adversaries, TwoUpdates, Lbfgs, Clipped])
def test_kinds_of_optimization(make_module: Any, tmp_path: Path):
    unusual = {
        "make_module": make_module,
        "val_check_interval": 1.0,
        "accumulate_grad_batches": 1,
    }
    expected = fit(**unusual)
    assert differences(fit(AsymCheckCallback(tmp_path / "whole"), **unusual), expected) == []
    steps = {Adversaries: 2, TwoUpdates: 4}.get(make_module, 1)  # of a batch, for Lightning
    url = tmp_path / "run"
    interrupted(url, "on_before_optimizer_step", steps * (BATCHES + 4), **unusual)
    assert committed_steps(LocalStore(url))[-1] == BATCHES + 4
    check_resumed(fit(AsymCheckCallback(url), seed=99, **unusual), expected)


class Counted(LightningDataModule):
    """Data that knows which epoch it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0

    def train_dataloader(self) -> Any:
        self.loaded += 1
        return shuffled()

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": self.loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["loaded"]


def test_data_modules_and_callbacks_have_their_state_back(tmp_path: Path):
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "best", monitor="loss", save_top_k=2)

    module, data = Trains(), Counted()
    trainer = trainer_of(
        AsymCheckCallback(tmp_path / "run"), saving(), enable_checkpointing=True, max_epochs=2
    )
    trainer.fit(module, datamodule=data)
    again, other = Counted(), saving()
    trainer_of(
        AsymCheckCallback(tmp_path / "run"), other, enable_checkpointing=True, max_epochs=2
    ).fit(Trains(), datamodule=again)
    assert again.loaded == data.loaded + 1
    best = trainer.checkpoint_callback.best_k_models
    assert len(best) == 2
    assert differences(other.best_k_models, best) == []


def test_more_state(tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    fit(AsymCheckCallback(tmp_path, extra_state={"own": generator}), max_epochs=1)
    other = torch.Generator().manual_seed(4)
    fit(AsymCheckCallback(tmp_path, extra_state={"own": other}), max_epochs=1)
    assert torch.equal(other.get_state(), generator.get_state())


def test_steps_are_numbered_on_from_a_checkpoint_of_lightning(tmp_path: Path):
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Denoiser(), shuffled(), shuffled())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer = trainer_of(AsymCheckCallback(tmp_path / "run"), max_epochs=2)
    trainer.fit(Denoiser(), shuffled(), shuffled(), ckpt_path=tmp_path / "first.ckpt")
    assert committed_steps(LocalStore(tmp_path / "run"))[0] > UPDATES


# -- what is refused ---------------------------------------------------------------------------


def test_two_checkpoints_to_restore(tmp_path: Path):
    trainer = trainer_of(AsymCheckCallback(tmp_path / "run"), max_epochs=1)
    trainer.fit(Denoiser(), shuffled(), shuffled())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    trainer = trainer_of(AsymCheckCallback(tmp_path / "run"), max_epochs=2)
    with pytest.raises(StateMismatchError, match=r"other\.ckpt"):
        trainer.fit(Denoiser(), shuffled(), shuffled(), ckpt_path=tmp_path / "other.ckpt")
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_other_strategies(tmp_path: Path):
    strategy = FSDPStrategy.__new__(FSDPStrategy)
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(UnsupportedStateError, match="FSDPStrategy"):
        AsymCheckCallback(tmp_path).on_fit_start(trainer, Denoiser())


def test_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.__version__", "2.7.1")
    with pytest.raises(UnsupportedStateError, match=r"Lightning 2\.7\.1"):
        trainer_of(AsymCheckCallback(tmp_path)).fit(Denoiser(), shuffled(), shuffled())


def test_compiled_as_a_whole(tmp_path: Path):
    trainer = trainer_of(AsymCheckCallback(tmp_path))
    with pytest.raises(UnsupportedStateError, match="compiled"):
        trainer.fit(torch.compile(Denoiser()), shuffled(), shuffled())


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    code = "import sys, asymcheck_torch; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
