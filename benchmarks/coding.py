"""Bytes and speed of coding states of real training: ours beside zstd, zipnn, blosc2 and pcodec.

    python benchmarks/coding.py --output build/coding.json [--small] [--gradients bfloat16 float32]

A small GPT learns English text, byte by byte: bfloat16 parameters, float32 masters in AdamW,
gradients clipped to a norm of 1. They are bfloat16, as in mixed precision, or float32 (the whole
training is; the parameters' bfloat16 copy is made of the masters). States of 14 bytes per parameter
are kept at a step k and 1, 10 and 100 steps later, and coded in blocks of 2^20 elements: each leaf
kind by every coder with and without the state at k as predecessor, and the whole state by ours
(`replay` codes the leaves of a parameter jointly). Everything decoded is compared bit by bit.

Speeds are GB (1e9 bytes) of raw state a second of processor time, of one thread, medians over
rounds in which all coders take turns. The chain's is that of the library's own reader, digests and
reads from the page cache included: (seconds for the last step - seconds for the base) / increments.

zipnn, blosc2 and pcodec are measured if installed (pip install zipnn blosc2 pcodec).
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

import asymcheck
from asymcheck.codecs import Codec, Column, DeltaCodec, PlaneCodec, ReplayCodec
from asymcheck.reader import open_step, whole
from asymcheck.state import Update, numpy_view
from asymcheck.stores import open_store
from asymcheck_torch.updates import update_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(1, str(Path(__file__).parent / "common"))
from coders import Coder, others, ours
from gpt2 import GPT2, TINY, ByteBatches, GPT2Config

ROLES = {"params": "copy", "master": "weight", "exp_avg": "first", "exp_avg_sq": "second"}
GAPS = (1, 10, 100)
BLOCK_SIZE = 1 << 20
FULL = "full"
SMALL = GPT2Config(width=128, layers=2, heads=4)

State = dict[str, NDArray[Any]]
"""One flat array of each kind."""


# -- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """States by step, and the update that each of them is the result of."""

    states: Mapping[int, State]
    updates: Mapping[int, Update]


def train(args: argparse.Namespace, gradients: str) -> Run:
    torch.manual_seed(0)
    config = SMALL if args.small else TINY
    model = GPT2(config)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model.to(getattr(torch, gradients))
    optimizer = torch.optim.AdamW(masters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    batches = ByteBatches(english_text(args.text), batch=args.batch, context=config.context, seed=1)
    kept = {*range(args.step, args.step + args.chain + 1), *(args.step + gap for gap in GAPS)}
    states: dict[int, State] = {}
    updates: dict[int, Update] = {}
    for step in range(1, max(kept) + 1):
        train_step(model, masters, optimizer, next(batches))
        if step in kept:
            states[step] = state_of(masters, optimizer)
            update = update_of(optimizer, 0, optimizer.param_groups[0], step)
            updates[step] = replace(update, roles=tuple(ROLES.items()))
    return Run(states, updates)


def english_text(path: Path | None) -> bytes:
    """The text to train on: a file, or the manual pages that come with Python itself."""
    if path is not None:
        return path.read_bytes()
    return "\n".join(pydoc_data.topics.topics.values()).encode()


def train_step(model: GPT2, masters: list[Any], optimizer: Any, batch: Any) -> None:
    model(*batch).backward()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad, parameter.grad = parameter.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.copy_(master)


def state_of(masters: list[Any], optimizer: Any) -> State:
    def flat(tensors: Iterator[Any]) -> NDArray[Any]:
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()

    master = flat(iter(masters))
    moments = {
        kind: flat(optimizer.state[master][kind] for master in masters)
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return {"params": master.astype(ml_dtypes.bfloat16), "master": master, **moments}


# -- measuring ---------------------------------------------------------------------------------


@dataclass
class Figures:
    """What one coder made of some columns."""

    raw_nbytes: int
    stored_nbytes: int
    encode_s: list[float]
    decode_s: list[float]

    def plain(self) -> dict[str, float]:
        return {
            "ratio": self.stored_nbytes / self.raw_nbytes,
            "encode_gb_s": self.raw_nbytes / median(self.encode_s) / 1e9,
            "decode_gb_s": self.raw_nbytes / median(self.decode_s) / 1e9,
        }


def columns_of(kind: str, new: State, old: State | None) -> list[Column]:
    def blocks(array: NDArray[Any]) -> list[NDArray[np.uint8]]:
        starts = range(0, array.size, BLOCK_SIZE)
        return [array[start : start + BLOCK_SIZE].view(np.uint8) for start in starts]

    news = blocks(new[kind])
    olds = [None] * len(news) if old is None else blocks(old[kind])
    return [Column(kind, new[kind].dtype, n, o) for n, o in zip(news, olds, strict=True)]


def seconds(work: Callable[[], object]) -> float:
    """Of processor time."""
    begun_s = time.process_time()
    work()
    return time.process_time() - begun_s


def measure_leaf(
    coders: Sequence[Coder], columns: Sequence[Column], repeats: int
) -> dict[str, dict[str, float]]:
    raw_nbytes = sum(column.new.nbytes for column in columns)
    figures = {coder.name: Figures(raw_nbytes, 0, [], []) for coder in coders}
    outs = [np.zeros_like(column.new) for column in columns]
    for turn in range(repeats + 1):  # the first is not timed
        for coder in coders:
            found = figures[coder.name]
            payloads: list[Any] = []
            decoded: list[Any] = []
            encode_s = seconds(lambda: payloads.extend(map(coder.encode, columns)))  # noqa: B023
            decode_s = seconds(lambda: decoded.extend(map(coder.decode, payloads, columns, outs)))  # noqa: B023
            for column, data in zip(columns, decoded, strict=True):
                check(column.new, np.frombuffer(data, np.uint8), coder.name)
            found.stored_nbytes = sum(memoryview(payload).nbytes for payload in payloads)
            if turn:
                found.encode_s.append(encode_s)
                found.decode_s.append(decode_s)
    return {name: found.plain() for name, found in figures.items()}


def measure_state(
    codecs: Sequence[Codec], new: State, old: State | None, repeats: int
) -> dict[str, dict[str, Any]]:
    """All kinds of a block at once."""
    groups = list(zip(*(columns_of(kind, new, old) for kind in ROLES), strict=True))
    raw_nbytes = sum(array.nbytes for array in new.values())
    figures = {codec.id: Figures(raw_nbytes, 0, [], []) for codec in codecs}
    ratios: dict[str, dict[str, float]] = {}
    outs = [[replace(c, new=np.zeros_like(c.new)) for c in group] for group in groups]
    for turn in range(repeats + 1):
        for codec in codecs:
            found = figures[codec.id]
            coded: list[list[Any]] = []
            encode_s = seconds(lambda: coded.extend(map(codec.encode, groups)))  # noqa: B023
            payloads = [[memoryview(payload) for payload in group] for group in coded]
            decode_s = seconds(lambda: list(map(codec.decode, outs, payloads)))  # noqa: B023
            for column, out in zip(sum(groups, ()), sum(outs, []), strict=True):
                check(column.new, out.new, codec.id)
            by_kind = [sum(p.nbytes for p in each) for each in zip(*payloads, strict=True)]
            found.stored_nbytes = sum(by_kind)
            ratios[codec.id] = {
                kind: nbytes / new[kind].nbytes for kind, nbytes in zip(ROLES, by_kind, strict=True)
            }
            if turn:
                found.encode_s.append(encode_s)
                found.decode_s.append(decode_s)
    return {
        name: found.plain() | {"ratio_by_kind": ratios[name]} for name, found in figures.items()
    }


def check(expected: NDArray[np.uint8], found: NDArray[np.uint8], name: str) -> None:
    if not np.array_equal(expected, found):
        sys.exit(f"{name} does not give back what was encoded")


def chain_gb_s(codec: str, run: Run, first: int, increments: int, repeats: int) -> float:
    """Of an increment, as the library reads a chain of them with one thread."""
    with tempfile.TemporaryDirectory() as root:
        save_chain(root, codec, run, first, increments)
        base_s, last_s = ([], [])
        for _ in range(repeats):
            base_s.append(read_seconds(root, first, run))
            last_s.append(read_seconds(root, first + increments, run))
    nbytes = sum(array.nbytes for array in run.states[first].values())
    return nbytes * increments / (median(last_s) - median(base_s)) / 1e9


def save_chain(root: str, codec: str, run: Run, first: int, increments: int) -> None:
    strategy = asymcheck.AsymCheck(policy=asymcheck.Always(codec))
    with asymcheck.Checkpointer(
        root, strategy=strategy, max_chain=increments, max_to_keep=None
    ) as checkpointer:
        for step in range(first, first + increments + 1):
            state = {kind: {"w": array} for kind, array in run.states[step].items()}
            view = replace(numpy_view(state), updates={"w": run.updates[step]})
            checkpointer.begin(step, view).finish()
            checkpointer.wait()


def read_seconds(root: str, step: int, run: Run) -> float:
    state = {f"{kind}/w": array for kind, array in run.states[step].items()}
    outs = {path: np.zeros_like(array) for path, array in state.items()}
    with closing(open_store(root)) as store:
        checkpoint = open_step(store, step, threads=1)
        targets = [whole(path, out) for path, out in outs.items()]
        found_s = seconds(lambda: checkpoint.read_into(targets))
    for path, array in state.items():
        check(array.view(np.uint8), outs[path].view(np.uint8), f"step {step}")
    return found_s


# -- the whole benchmark -----------------------------------------------------------------------


def measure_run(args: argparse.Namespace, run: Run) -> list[dict[str, Any]]:
    """One row for each leaf kind, gap and coder; of the whole state, the kind is `state`."""
    libraries, _ = others()
    rows: list[dict[str, Any]] = []

    def add(kind: str, gap: int | str, figures: Mapping[str, Mapping[str, Any]]) -> None:
        rows.extend({"kind": kind, "gap": gap, "coder": c, **found} for c, found in figures.items())

    old, last = run.states[args.step], args.step + GAPS[-1]
    full = [ours(PlaneCodec()), *(library.alone() for library in libraries)]
    differences = [
        ours(DeltaCodec()),
        *(library.of_xor() for library in libraries if library.name != "pcodec-8"),
        *(library.of_subtraction() for library in libraries if library.name in SUBTRACTED),
    ]
    for kind in ROLES:
        columns = columns_of(kind, run.states[last], None)
        add(kind, FULL, measure_leaf(full, columns, args.repeats))
        for gap in GAPS:
            columns = columns_of(kind, run.states[args.step + gap], old)
            add(kind, gap, measure_leaf(differences, columns, args.repeats))
    add("state", FULL, measure_state([PlaneCodec()], run.states[last], None, args.repeats))
    for gap in GAPS:
        step = args.step + gap
        replay = ReplayCodec("adam", tuple(ROLES.values()), run.updates[step].numbers)
        figures = measure_state([DeltaCodec(), replay], run.states[step], old, args.repeats)
        for kind, ratio in figures["replay"]["ratio_by_kind"].items():
            add(kind, gap, {"replay": {"ratio": ratio}})
        if gap == 1:
            for name, found in figures.items():
                found["chain_gb_s"] = chain_gb_s(name, run, args.step, args.chain, args.repeats)
        add("state", gap, figures)
    return rows


SUBTRACTED = ("zstd-1", "pcodec-8")


# -- tables ------------------------------------------------------------------------------------


def leaf_table(rows: Sequence[Mapping[str, Any]], full: bool) -> Iterator[str]:
    """Of one table of all leaf kinds, with or without predecessor."""
    chosen = [row for row in rows if row["kind"] != "state" and (row["gap"] == FULL) == full]
    coders = list(dict.fromkeys(row["coder"] for row in chosen))
    yield table_row(["leaf", "gap", *coders])
    yield table_row(["---"] * (2 + len(coders)))
    cells = {(row["kind"], row["gap"], row["coder"]): cell(row) for row in chosen}
    for kind, gap in dict.fromkeys((row["kind"], row["gap"]) for row in chosen):
        yield table_row([kind, str(gap), *(cells.get((kind, gap, c), "–") for c in coders)])


def cell(row: Mapping[str, Any]) -> str:
    ratio = f"{100 * row['ratio']:.1f}"
    if "encode_gb_s" not in row:
        return ratio
    return f"{ratio} ({row['encode_gb_s']:.2f} / {row['decode_gb_s']:.2f})"


def state_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    heads = ["gradients", "coder", "gap", "% of raw", "encode", "decode", "chain decode"]
    yield table_row(heads)
    yield table_row(["---"] * len(heads))
    for gradients, rows in runs.items():
        for row in rows:
            if row["kind"] == "state":
                speeds = [row["encode_gb_s"], row["decode_gb_s"], row.get("chain_gb_s")]
                shown = ["–" if speed is None else f"{speed:.2f}" for speed in speeds]
                ratio = f"{100 * row['ratio']:.1f}"
                yield table_row([gradients, row["coder"], str(row["gap"]), ratio, *shown])


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    both = ("bfloat16", "float32")
    parser.add_argument("--gradients", nargs="+", choices=both, default=both)
    parser.add_argument("--step", type=int, default=50, help="k, the first step that is kept")
    parser.add_argument("--chain", type=int, default=4, help="increments of the chain")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is shown")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--text", type=Path, help="any text file (default: Python's own manual)")
    parser.add_argument("--small", action="store_true", help="a model of 0.4 M parameters")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    _, missing = others()
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}\n")
    runs: dict[str, list[dict[str, Any]]] = {}
    for gradients in args.gradients:
        run = train(args, gradients)
        size = run.states[args.step]["master"].size
        runs[gradients] = measure_run(args, run)
        print(f"{size / 1e6:.1f} M parameters, {gradients} gradients; % of raw (encode / decode)\n")
        for full in (True, False):
            print("\n".join(leaf_table(runs[gradients], full)), end="\n\n", flush=True)
    print("the whole state; GB/s\n")
    print("\n".join(state_table(runs)))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
