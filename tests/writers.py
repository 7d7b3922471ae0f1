"""Several writers of one run, as threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from asymcheck import Checkpointer
from asymcheck.attempt import PendingSave
from asymcheck.partition import owned_range
from asymcheck.state import ArraySource, LeafSpec, ShardSpec, StateView, numpy_view
from asymcheck.stores.base import Store


def split_view(state: Any, writer: int, writers: int) -> StateView:
    """What a writer stores of a replicated state: of `ranks` its own entry, of the rest a part."""
    mine = {**state, "ranks": {k: v for k, v in state.get("ranks", {}).items() if k == writer}}
    view = numpy_view(mine)
    sources = [
        source
        if source.leaf.path.startswith("ranks/")
        else msgspec.structs.replace(source, owned=owned_range(source.leaf.size, writer, writers))
        for source in view.sources
        if isinstance(source, ArraySource)
    ]
    return replace(view, sources=tuple(sources))


class BoxSource:
    """A box of a larger array, held by one writer."""

    def __init__(self, path: str, whole: np.ndarray, shard: ShardSpec) -> None:
        self.leaf = LeafSpec(path, whole.dtype.name, whole.shape)
        self.shard = shard
        self.group = f"{path} {shard}"
        self.owned = (0, shard.size)
        cut = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.shape, strict=True))
        self._flat = np.ascontiguousarray(whole[cut]).reshape(-1)

    def read_into(self, start: int, count: int, out: np.ndarray) -> None:
        out[:] = self._flat[start : start + count].view(np.uint8)

    def check_unchanged(self) -> None:
        pass


class Writers:
    """`count` checkpointers of one run; what they do is done by all at once."""

    def __init__(
        self,
        store: str | Store,
        count: int,
        *,
        run_id: str = "run",
        each: Mapping[int, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.each = [
            Checkpointer(
                store,
                writer=i,
                writers=count,
                run_id=run_id,
                **{"commit_timeout_s": 30.0, **options, **(each or {}).get(i, {})},
            )
            for i in range(count)
        ]
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def all(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(writer)` on all at once: the results, exceptions among them."""
        futures = [self._threads.submit(work, i) for i in range(len(self.each))]
        return [future.exception(60) or future.result() for future in futures]

    def begin(self, writer: int, step: int, view: StateView, **more: Any) -> PendingSave:
        """Capture a step on one writer."""
        capture = self.each[writer].begin(step, view, **more)
        capture.finish()
        return capture.pending

    def save(self, step: int, view: Callable[[int], StateView], **more: Any) -> list[Any]:
        """Save a step on all; None for every writer on which it is committed, else the error."""

        def work(writer: int) -> None:
            self.begin(writer, step, view(writer), **more).wait(60)

        return self.all(work)

    def save_state(self, step: int, state: Any, **more: Any) -> list[Any]:
        """`save` of a replicated state."""
        return self.save(step, lambda writer: split_view(state, writer, len(self.each)), **more)

    def close(self) -> list[Any]:
        """Close all; the errors."""
        closed = self.all(lambda writer: self.each[writer].close())
        self._threads.shutdown()
        return closed
