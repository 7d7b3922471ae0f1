"""Extra state: anything with state_dict() and load_state_dict(), and when its state is taken."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from asymcheck_torch.tensors import is_array


class Moment(Enum):
    """When the state of an extra is the state of the step."""

    UPDATE = "right after the optimizer's update"
    FORWARD = "right before the next forward pass"


@dataclass(frozen=True, slots=True)
class Extra:
    """An object whose state belongs to a checkpoint, under a name."""

    name: str
    value: Any
    moment: Moment

    def state(self) -> Any:
        """Its state now; may share memory with the object."""
        if isinstance(self.value, torch.Generator):
            return self.value.get_state()
        return self.value.state_dict()

    def load(self, state: Any) -> None:
        """Give it a state back."""
        if isinstance(self.value, torch.Generator):
            self.value.set_state(state)
        else:
            self.value.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class _Timed:
    value: Any
    moment: Moment


def at_update(value: Any) -> Any:
    """Mark an extra state as a data position: taken right after the optimizer's update."""
    return _Timed(value, Moment.UPDATE)


def at_forward(value: Any) -> Any:
    """Mark an extra state as one that the loop steps after `optimizer.step()`.

    It is taken right before the next forward pass.
    """
    return _Timed(value, Moment.FORWARD)


def named_extras(extra_state: Any) -> list[Extra]:
    """The extras of `attach(extra_state=...)`: a mapping of names, or one object ("extra").

    Raises:
        TypeError: an object has no state_dict() and load_state_dict() and is no Generator.
    """
    if extra_state is None:
        return []
    if isinstance(extra_state, Mapping) and not hasattr(extra_state, "state_dict"):
        return [_extra(name, value) for name, value in extra_state.items()]
    return [_extra("extra", extra_state)]


def _extra(name: object, value: Any) -> Extra:
    if not isinstance(name, str):
        raise TypeError(f"the name of an extra state is a str, not {name!r}")
    if not isinstance(value, _Timed):
        value = _Timed(value, Moment.UPDATE if _is_position(value) else Moment.FORWARD)
    inner = value.value
    whole = callable(getattr(inner, "state_dict", None)) and callable(
        getattr(inner, "load_state_dict", None)
    )
    if not whole and not isinstance(inner, torch.Generator):
        raise TypeError(
            f"extra state {name!r} ({type(inner).__name__}) has no state_dict() and "
            "load_state_dict()"
        )
    return Extra(name, inner, value.moment)


def _is_position(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):  # Sequential and ModuleList are iterable
        return False
    return isinstance(value, torch.Generator) or any(
        hasattr(value, name) for name in ("__iter__", "__next__")
    )


def map_arrays(value: Any, on_array: Callable[[Any], Any]) -> Any:
    """A nested state with every tensor and array replaced; containers are fresh.

    Objects that no checkpoint can hold are passed on, to be refused with their path later.
    """
    if is_array(value):
        return on_array(value)
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({key: map_arrays(item, on_array) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(map_arrays(item, on_array) for item in value)
    return value


def private(value: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A nested state that nobody else can change; `copy` copies the tensors."""
    return map_arrays(value, lambda a: copy(a) if isinstance(a, torch.Tensor) else a.copy())
