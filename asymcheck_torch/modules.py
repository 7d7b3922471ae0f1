"""What a module holds, under stable names: parameters, persistent buffers, extra state."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(module: nn.Module) -> nn.Module:
    """The module that the user wrote: without the wrappers of DDP and `torch.compile`.

    So names carry no prefix, and a checkpoint fits the wrapped and the bare module alike.
    """
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, frozen ones too; a tied parameter appears under each of its names."""
    return dict(module.named_parameters(remove_duplicate=False))


Places = Sequence[tuple[dict[str, Any], str, torch.Tensor | None]]
"""Where parameters and buffers are registered, under which name, and which ones."""


def places(module: nn.Module) -> Places:
    """The parameters and buffers of a module and its submodules as they are registered now."""
    return [
        (registered, name, tensor)
        for part in module.modules()
        for registered in (part._parameters, part._buffers)
        for name, tensor in registered.items()
    ]


@contextmanager
def as_updated(updated: Places) -> Generator[None]:
    """What was registered at the update, out of reach of `torch.func`'s transformations.

    During a `functional_call` other tensors are in the places of the parameters; and what is
    computed within `grad` or `vmap` belongs to that. A `Parameter` that replaces another is the
    user's own, and stays.
    """
    changed = [
        (registered, name, tensor, now)
        for registered, name, tensor in updated
        if (now := registered.get(name)) is not tensor and not isinstance(now, nn.Parameter)
    ]
    lent = changed if any(isinstance(own, nn.Parameter) for _, _, own, _ in changed) else []
    with _outside_of_transformations():
        try:
            for registered, name, own, _ in lent:
                registered[name] = own
            yield
        finally:
            for registered, name, _, now in lent:
                registered[name] = now


def _outside_of_transformations() -> AbstractContextManager[object]:
    interpreters: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if interpreters.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def _submodules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        yield (f"{name}." if name else ""), child


def own_persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers of a module itself, without its submodules'."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def named_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """All persistent buffers, those of a shared submodule under each of its names."""
    return {
        prefix + name: buffer
        for prefix, child in _submodules(module)
        for name, buffer in own_persistent_buffers(child).items()
    }


def renormed_in_forward(module: nn.Module) -> list[str]:
    """The names of the embeddings that are rescaled in the forward pass (`max_norm`)."""
    return [
        f"{prefix}weight"
        for prefix, child in _submodules(module)
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None
    ]


def _stateful(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules that keep more than parameters and buffers (`get_extra_state`)."""
    for prefix, child in _submodules(module):
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield prefix.removesuffix("."), child


def module_extra(module: nn.Module) -> dict[str, Any]:
    """What `get_extra_state` gives, by the submodule's name; may share memory with it."""
    return {name: child.get_extra_state() for name, child in _stateful(module)}


def stateful_names(module: nn.Module) -> list[str]:
    """The names of the submodules that have extra state."""
    return [name for name, _ in _stateful(module)]


def load_module_extra(module: nn.Module, extra: Mapping[str, Any]) -> None:
    """Give every submodule its extra state back."""
    for name, child in _stateful(module):
        child.set_extra_state(extra[name])


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` runs a module as a whole: hooks inside would break its graph."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def visible(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, but for those inside of compiled ones; each once."""
    seen: dict[nn.Module, None] = {module: None}
    if not is_compiled(module):
        for child in module.children():
            seen.update(dict.fromkeys(visible(child)))
    yield from seen


def changes_in_forward(module: nn.Module) -> list[nn.Module]:
    """Visible submodules whose forward pass may change what they keep: buffers, extra state."""
    return [
        child
        for child in visible(module)
        if any(own_persistent_buffers(c) for c in child.modules()) or any(_stateful(child))
    ]
