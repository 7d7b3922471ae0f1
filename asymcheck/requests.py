"""Many requests to a store, all at once where each is a journey over a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from asymcheck.stores.base import Store
from asymcheck.threads import in_parallel

A = TypeVar("A")
B = TypeVar("B")


def each(store: Store, ask: Callable[[A], B], things: Sequence[A]) -> list[B]:
    """`ask(thing)` for each thing, in their order; as many at a time as the store serves.

    Raises:
        what `ask` raises first.
    """
    concurrency = store.guarantees.concurrency
    if concurrency is None or len(things) < 2:
        return [ask(thing) for thing in things]

    def numbered(number: int) -> tuple[int, B]:
        return number, ask(things[number])

    calls = [partial(numbered, number) for number in range(len(things))]
    answers = dict(in_parallel(calls, concurrency, "asymcheck-request"))
    return [answers[number] for number in range(len(things))]
