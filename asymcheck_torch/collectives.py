"""Collectives of torch.distributed, seen as they begin and as they end.

Whoever calls them, from Python or C++ (DeepSpeed, FSDP2, DDP, DTensor, functional collectives),
they become operators of the namespace `c10d`, which the dispatcher takes through a sequence of
keys to the kernel of a device. While anybody observes, kernels of ours (`torch.library`) stand at
`BackendSelect`, the last key before those of devices, which is in force in every mode and which
these operators do not use. They pass the call on. So no function and no kernel of PyTorch or
DeepSpeed is replaced, and what a collective returns is what its backend gave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.distributed import ProcessGroup, Work

_AFTER = torch._C._dispatch_keyset_full_after(DispatchKey.BackendSelect)
_NAMES = {
    "_allgather_base_": "all_gather_into_tensor",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather_coalesced",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor_coalesced",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce_coalesced",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "barrier": "barrier",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "reduce_": "reduce",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor_coalesced",
    "scatter_": "scatter",
}


class Collective(NamedTuple):
    """A collective: its name in torch.distributed, and the bytes of the whole tensor.

    For an all-gather that is what all ranks get, for a reduce-scatter what each one gives: the
    size that bandwidths of collectives are stated for (as "algbw" by NVIDIA's nccl-tests).
    """

    name: str
    nbytes: int


Begin = Callable[[Collective], Callable[[], None]]
"""Is called as a collective begins; what it returns is called once, as it ends."""

Around = Callable[[Collective, Callable[[], Work]], Work]
"""Is given a collective and what issues it; returns the work that the caller is to wait for."""


class Interception:
    """Something stands around every collective of this process until `remove`.

    Also a context manager.

    Args:
        around: called on the thread that issues the collective.
        innermost: it stands inside of all others, so that they see what it does.
    """

    def __init__(self, around: Around, *, innermost: bool = False) -> None:
        self._around = around
        _kernels.add(around, 0 if innermost else None)

    def remove(self) -> None:
        """Stand back; what is under way still ends as it would have. May be called again."""
        _kernels.remove(self._around)

    def __enter__(self) -> Interception:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class StandInWork(Work):
    """Work in place of another: waited for by the caller, and does what that does."""

    # C++ may be the one to wait, and does not keep the part of an object that is Python's.
    _unwaited: ClassVar[set[StandInWork]] = set()

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self._unwaited.add(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the collective is done; raises what it raises."""
        try:
            return self.work.wait(timeout)
        finally:
            self._unwaited.discard(self)

    def is_completed(self) -> bool:
        """Whether it is done."""
        return self.work.is_completed()

    def is_success(self) -> bool:
        """Whether it is done and did not fail."""
        return self.work.is_success()

    def exception(self) -> Any:
        """Why it failed."""
        return self.work.exception()

    def result(self) -> list[torch.Tensor]:
        """Its tensors."""
        return self.work.result()

    def synchronize(self) -> None:
        """Make the current stream wait for it."""
        self.work.synchronize()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of its value, if its backend has them."""
        return self.work.get_future()


class _Waited(StandInWork):
    """Work that tells when it was waited for."""

    def __init__(self, work: Work, end: Callable[[], None]) -> None:
        super().__init__(work)
        self._end: Callable[[], None] | None = end

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the collective is done, which ends it."""
        try:
            return super().wait(timeout)
        finally:
            end, self._end = self._end, None
            if end is not None:
                end()


def observe_collectives(begin: Begin) -> Interception:
    """Tell of every collective among several ranks, until the result is removed.

    `begin` is called on the thread that issues the collective. What it returned is called when the
    collective has completed, whether or not anybody waits for it, on any thread; neither may
    raise. Where the backend cannot tell of completion (gloo's reduce-scatters), it is called when
    the caller has waited. On CUDA "completed" means on the device: the call comes at once, on a
    stream that waits for the collective. Sends and receives between two ranks are not observed.
    """

    def around(collective: Collective, issue: Callable[[], Work]) -> Work:
        end = begin(collective)
        try:
            work = issue()
        except BaseException:
            end()
            raise
        try:
            future = work.get_future()
        except RuntimeError:  # there is none
            return _Waited(work, end)
        future.add_done_callback(lambda _: end())
        return work

    return Interception(around)


class _Kernels:
    """Our kernels: registered while there is anything to call around the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arounds: tuple[Around, ...] = ()  # from the innermost
        self._library: torch.library.Library | None = None

    def add(self, around: Around, position: int | None) -> None:
        with self._lock:
            arounds = list(self._arounds)
            arounds.insert(len(arounds) if position is None else position, around)
            if self._library is None:
                self._library = self._register()
            self._arounds = tuple(arounds)

    def remove(self, around: Around) -> None:
        with self._lock:
            self._arounds = tuple(each for each in self._arounds if each is not around)
            if not self._arounds and self._library is not None:
                self._library._destroy()  # takes the kernels away
                self._library = None

    def _register(self) -> torch.library.Library:
        library = torch.library.Library("c10d", "IMPL", "BackendSelect")
        for name in _NAMES:
            library.impl(name, self._kernel(name), with_keyset=True)
        return library

    def _kernel(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.c10d, name).default

        def kernel(keyset: DispatchKeySet, *arguments: Any) -> Any:
            # Releases the GIL: threads of backends ask for it while they hold locks of theirs.
            go_on = partial(operator.redispatch, keyset & _AFTER, *arguments)
            if _group(arguments).size() == 1:  # nothing moves
                return go_on()
            issued: list[Any] = []

            def issue() -> Work:
                result = go_on()
                boxed = result[-1] if isinstance(result, tuple) else result
                issued[:] = [result, Work.unbox(boxed)]
                return issued[1]

            collective = Collective(_NAMES[name], max(map(_nbytes, arguments)))
            call: Callable[[], Work] = issue
            for around in self._arounds:
                call = partial(around, collective, call)
            work = call()
            result, original_work = issued
            return result if work is original_work else _with_work(result, work)

        return kernel


_kernels = _Kernels()


def _group(arguments: Sequence[Any]) -> ProcessGroup:
    return ProcessGroup.unbox(next(a for a in arguments if isinstance(a, torch.ScriptObject)))


def _nbytes(argument: Any) -> int:
    """Bytes of the tensors in an argument, lists of lists included."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_nbytes, argument)) if isinstance(argument, list | tuple) else 0


def _with_work(result: Any, work: Work) -> Any:
    return (*result[:-1], work.boxed()) if isinstance(result, tuple) else work.boxed()
