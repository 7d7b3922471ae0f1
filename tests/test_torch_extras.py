"""Extra state is taken at its moment: positions after the update, schedules before the forward."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_runs import Run, assert_resumes, mlp, plain_step  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck_torch.extras import named_extras  # noqa: E402


class Counting:
    """Counts; the loop may call it at any time."""

    def __init__(self):
        self.count = 0
        self.history = []

    def state_dict(self):
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state):
        self.count, self.history = state["count"], state["history"]


class Sampler(Counting):
    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        self.history.append(self.count)
        return self.count


def saved_count(extra, url, name=None):
    """The count in the checkpoint of step 2, the loop counting after update and before forward."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    counter = extra.value if hasattr(extra, "moment") else extra
    with asymcheck_torch.attach(module, optimizer, url=url, extra_state=extra):
        for _ in range(3):
            plain_step(module, optimizer)
            counter.count += 1  # between the update and the next forward pass
            counter.history.append("x")
    extras = asymcheck_torch.load(url, 2)["ranks"]["0"]["extra"]
    return extras["extra"]["count"], len(extras["extra"]["history"])


def test_positions_are_taken_right_after_the_update():
    assert saved_count(Sampler(), "memory://position") == (1, 1)


def test_everything_else_is_taken_before_the_next_forward_pass():
    assert saved_count(Counting(), "memory://schedule") == (2, 2)


def test_the_moment_can_be_chosen():
    assert saved_count(asymcheck_torch.at_update(Counting()), "memory://chosen-update") == (1, 1)
    assert saved_count(asymcheck_torch.at_forward(Sampler()), "memory://chosen-forward") == (2, 2)


def test_the_last_step_takes_schedules_when_closing():
    counter = Counting()
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with asymcheck_torch.attach(
        module, optimizer, url="memory://closing", extra_state={"c": counter}
    ):
        plain_step(module, optimizer)
        counter.count = 41
    assert asymcheck_torch.load("memory://closing")["ranks"]["0"]["extra"]["c"]["count"] == 41


def test_sampler_that_draws_from_its_own_generators():
    class Shuffled:
        """An endless shuffled order by a NumPy and a torch generator, resumable."""

        def __init__(self):
            self.numpy = np.random.Generator(np.random.MT19937(3))
            self.torch = torch.Generator().manual_seed(5)
            self.order, self.position = np.arange(0), 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.position == len(self.order):
                self.order, self.position = self.numpy.permutation(4), 0
            self.position += 1
            scale = float(self.order[self.position - 1] + 1)
            return scale * torch.randn(6, 12, generator=self.torch)

        def state_dict(self):
            return {
                "numpy": self.numpy.bit_generator.state,
                "torch": self.torch.get_state(),
                "order": self.order,
                "position": self.position,
            }

        def load_state_dict(self, state):
            assert isinstance(state["order"], np.ndarray)
            self.numpy.bit_generator.state = state["numpy"]
            self.torch.set_state(state["torch"])
            self.order, self.position = state["order"], state["position"]

    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        sampler = Shuffled()

        def iterate(_i):
            x = next(sampler)
            loss = (module(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate, {"sampler": sampler})

    assert_resumes(build, "memory://sampler")


def test_a_torch_generator_is_a_position():
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(3)

        def iterate(_i):
            x = torch.randn(6, 12, generator=generator)
            loss = (module(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate, {"generator": generator})

    assert_resumes(build, "memory://generator")


def test_averaged_weights():
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        average = torch.optim.swa_utils.AveragedModel(
            module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

        def iterate(_i):
            loss = plain_step(module, optimizer)
            average.update_parameters(module)
            return loss

        return Run(module, [optimizer], iterate, {"average": average})

    assert_resumes(build, "memory://average")


def test_average_of_a_sequential_is_no_position():
    assert saved_moment(nn.Sequential(nn.Linear(2, 2))) == "FORWARD"
    assert saved_moment(torch.Generator()) == "UPDATE"
    assert saved_moment(Sampler()) == "UPDATE"
    assert saved_moment(Counting()) == "FORWARD"


def saved_moment(value):
    (extra,) = named_extras({"x": value})
    return extra.moment.name


@pytest.mark.parametrize("bad", [3, {"x": object()}, {1: Counting()}])
def test_what_has_no_state_dict_is_refused_at_once(bad):
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError):
        asymcheck_torch.attach(module, optimizer, url="memory://bad", extra_state=bad)


def test_extra_state_of_modules():
    class Scale(nn.Module):
        """Keeps an amplitude history outside of buffers, as fp8 layers do."""

        def __init__(self):
            super().__init__()
            self.history = []

        def forward(self, x):
            self.history = [*self.history[-2:], float(x.detach().abs().max())]
            return x / max(self.history)

        def get_extra_state(self):
            return {"history": self.history}

        def set_extra_state(self, state):
            self.history = state["history"]

    def build():
        module = nn.Sequential(nn.Linear(12, 12), Scale(), nn.Linear(12, 12))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    assert_resumes(build, "memory://module-extra")
