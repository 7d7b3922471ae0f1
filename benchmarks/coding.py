"""Bytes and speed of coding states of real training: ours beside zstd, zipnn, blosc2 and pcodec.

    python benchmarks/coding.py --output build/coding.json [--small] [--gradients bfloat16 float32]

A small GPT learns English text, byte by byte: bfloat16 parameters, float32 masters in AdamW,
gradients clipped to a norm of 1. They are bfloat16, as in mixed precision, or float32 (the whole
training is; the parameters' bfloat16 copy is made of the masters). States of 14 bytes per parameter
are kept at a step k and 1, 10 and 100 steps later, and coded in blocks of 2^20 elements: each leaf
kind by every coder with and without the state at k as predecessor, the whole state by every coder
without it and by ours with it (`replay` codes the leaves of a parameter jointly; `captured` is the
same with the gradients of the update, which are stored, too: bytes and speeds stay those of the 14
bytes). Everything decoded is compared bit by bit.

Speeds are GB (1e9 bytes) of raw state a second of processor time, of one thread, block by block,
medians over rounds in which all coders take turns. The chain's is that of the library's own reader,
digests and reads included: (seconds for the last step - seconds for the base) / increments.

zipnn, blosc2 and pcodec are measured if installed (pip install zipnn blosc2 pcodec).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

import asymcheck
from asymcheck.codecs import Column, DeltaCodec, PlaneCodec, ReplayCodec
from asymcheck.reader import open_step, whole
from asymcheck.state import Update, numpy_view
from asymcheck.stores import open_store
from asymcheck_torch.updates import update_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(1, str(Path(__file__).parent / "common"))
from coders import Coder, others, ours
from gpt2 import GPT2, TINY, ByteBatches, GPT2Config
from train_gpt2 import english_text

ROLES = {"params": "copy", "master": "weight", "exp_avg": "first", "exp_avg_sq": "second"}
GRADIENTS = {"gradients": "captured"}
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
    torch.set_num_threads(1)
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
            states[step] = state_of(model, masters, optimizer)
            update = update_of(optimizer, 0, optimizer.param_groups[0], step)
            updates[step] = replace(update, roles=tuple(ROLES.items()))
    return Run(states, updates)


def train_step(model: GPT2, masters: list[Any], optimizer: Any, batch: Any) -> None:
    model(*batch).backward()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad, parameter.grad = parameter.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.copy_(master)


def state_of(model: GPT2, masters: list[Any], optimizer: Any) -> State:
    def flat(tensors: Iterable[Any]) -> Any:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    low = flat(parameter.bfloat16() for parameter in model.parameters())
    moments = {
        kind: flat(optimizer.state[master][kind] for master in masters).numpy()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return {
        "params": low.view(torch.int16).numpy().view(ml_dtypes.bfloat16),
        "master": flat(masters).numpy(),
        **moments,
        "gradients": flat(master.grad for master in masters).numpy(),
    }


# -- measuring ---------------------------------------------------------------------------------


def blocks_of(array: NDArray[Any]) -> list[NDArray[np.uint8]]:
    starts = range(0, array.size, BLOCK_SIZE)
    return [array[start : start + BLOCK_SIZE].view(np.uint8) for start in starts]


def groups_of(kinds: Sequence[str], new: State, old: State | None) -> list[tuple[Column, ...]]:
    """For each block, its columns of these kinds."""

    def columns(kind: str) -> list[Column]:
        news = blocks_of(new[kind])
        olds = [None] * len(news) if old is None else blocks_of(old[kind])
        return [Column(kind, new[kind].dtype, n, o) for n, o in zip(news, olds, strict=True)]

    return list(zip(*map(columns, kinds), strict=True))


@dataclass
class Turn:
    """What a coder made of groups of columns."""

    encode_s: float = 0.0
    decode_s: float = 0.0
    stored_nbytes: Counter[str] = field(default_factory=Counter)

    def add(self, coder: Coder, columns: Sequence[Column]) -> None:
        """Encode, decode, compare; nothing is kept, so that memory is used again."""
        outs = [np.full_like(column.new, 0) for column in columns]  # their pages are there then
        begun_s = time.process_time()
        payloads = coder.encode(columns)
        encoded_s = time.process_time()
        decoded = coder.decode(payloads, columns, outs)
        self.decode_s += time.process_time() - encoded_s
        self.encode_s += encoded_s - begun_s
        for column, payload, data in zip(columns, payloads, decoded, strict=True):
            self.stored_nbytes[column.kind] += memoryview(payload).nbytes
            check(column.new, np.frombuffer(data, np.uint8), coder.name)


def measure(
    coders: Sequence[Coder], groups: Sequence[Sequence[Column]], repeats: int
) -> dict[str, dict[str, Any]]:
    """By the coder's name: ratios and speeds."""
    turns: dict[str, list[Turn]] = {coder.name: [] for coder in coders}
    for _ in range(1 + repeats):  # the first is not timed
        for coder in coders:
            turns[coder.name].append(Turn())
            for group in groups:
                turns[coder.name][-1].add(coder, group)
    raw_nbytes: Counter[str] = Counter()
    for column in itertools.chain(*groups):
        raw_nbytes[column.kind] += column.new.nbytes
    return {name: figures(raw_nbytes, taken[1:]) for name, taken in turns.items()}


def figures(raw_nbytes: Counter[str], turns: Sequence[Turn]) -> dict[str, Any]:
    stored_nbytes, total = turns[0].stored_nbytes, raw_nbytes.total()
    return {
        "ratio": stored_nbytes.total() / total,
        "encode_gb_s": total / median(turn.encode_s for turn in turns) / 1e9,
        "decode_gb_s": total / median(turn.decode_s for turn in turns) / 1e9,
        "ratio_by_kind": {kind: stored_nbytes[kind] / raw_nbytes[kind] for kind in raw_nbytes},
    }


def check(expected: NDArray[np.uint8], found: NDArray[np.uint8], name: str) -> None:
    if not np.array_equal(expected, found):
        sys.exit(f"{name} does not give back what was encoded")


def chain_gb_s(codec: str, run: Run, first: int, increments: int, repeats: int) -> float:
    """Of an increment, as the library reads a chain of them with one thread."""
    with tempfile.TemporaryDirectory() as root:
        save_chain(root, codec, run, first, increments)
        ends = (first, first + increments)
        turns = [[read_seconds(root, step, run) for step in ends] for _ in range(repeats)]
    base_s, last_s = map(median, zip(*turns, strict=True))
    nbytes = sum(run.states[first][kind].nbytes for kind in ROLES)
    return nbytes * increments / (last_s - base_s) / 1e9


def save_chain(root: str, codec: str, run: Run, first: int, increments: int) -> None:
    strategy = asymcheck.AsymCheck(policy=asymcheck.Always(codec))
    with asymcheck.Checkpointer(
        root, strategy=strategy, max_chain=increments, max_to_keep=None
    ) as checkpointer:
        for step in range(first, first + increments + 1):
            state = {kind: {"w": run.states[step][kind]} for kind in ROLES}
            view = replace(numpy_view(state), updates={"w": run.updates[step]})
            checkpointer.begin(step, view).finish()
            checkpointer.wait()


def read_seconds(root: str, step: int, run: Run) -> float:
    state = {f"{kind}/w": run.states[step][kind] for kind in ROLES}
    outs = {path: np.full_like(array, 0) for path, array in state.items()}
    with closing(open_store(root)) as store:
        checkpoint = open_step(store, step, threads=1)
        targets = [whole(path, out) for path, out in outs.items()]
        begun_s = time.process_time()
        checkpoint.read_into(targets)
        found_s = time.process_time() - begun_s
    for path, array in state.items():
        check(array.view(np.uint8), outs[path].view(np.uint8), f"step {step}")
    return found_s


# -- the whole benchmark -----------------------------------------------------------------------


Rows = list[dict[str, Any]]
"""Figures of a coder, with the kind of leaf (`state` for all together), the gap, the coder."""


def measure_run(args: argparse.Namespace, run: Run) -> Rows:
    last = run.states[args.step + GAPS[-1]]
    rows = measure_full(last, args.repeats)
    for gap in GAPS:
        rows += measure_gap(run, args.step, gap, args.repeats)
    for row in rows:
        if row["kind"] == "state" and row["gap"] == 1 and row["coder"] != "captured":
            row["chain_gb_s"] = chain_gb_s(row["coder"], run, args.step, args.chain, args.repeats)
    return rows


def measure_full(state: State, repeats: int) -> Rows:
    """Without a predecessor."""
    plane, libraries = ours(PlaneCodec()), others()[0]
    coders = [plane, *(library.alone() for library in libraries)]
    rows: Rows = []
    for name, kinds in (*((kind, [kind]) for kind in ROLES), ("state", [*ROLES])):
        rows += rows_of(name, FULL, measure(coders, groups_of(kinds, state, None), repeats))
    return rows


def measure_gap(run: Run, step: int, gap: int, repeats: int) -> Rows:
    """A state that many steps after its predecessor; `replay` codes all leaves of it together."""
    delta = ours(DeltaCodec())
    numbers = run.updates[step + gap].numbers
    replay = ours(ReplayCodec("adam", tuple(ROLES.values()), numbers))
    others_too = [lib.of_difference(name) for lib in others()[0] for name in lib.differences]
    new, old = run.states[step + gap], run.states[step]
    rows: Rows = []
    for kind in ROLES:
        coders = [delta, *others_too]
        rows += rows_of(kind, gap, measure(coders, groups_of([kind], new, old), repeats))
    together = measure([delta, replay], groups_of([*ROLES], new, old), repeats)
    for kind, ratio in together["replay"]["ratio_by_kind"].items():
        rows += rows_of(kind, gap, {"replay": {"ratio": ratio}})
    if gap == 1:
        together["captured"] = measure_captured(new, old, numbers, repeats)
    return rows + rows_of("state", gap, together)


def measure_captured(
    new: State, old: State, numbers: Mapping[str, float], repeats: int
) -> dict[str, Any]:
    """With the gradients, for each byte of the state without them."""
    roles = ROLES | GRADIENTS
    codec = ReplayCodec("adam", tuple(roles.values()), numbers)
    found = measure([ours(codec)], groups_of([*roles], new, old), repeats)["replay"]
    state_nbytes = sum(new[kind].nbytes for kind in ROLES)
    more = state_nbytes / (state_nbytes + new["gradients"].nbytes)
    return {
        "ratio": found["ratio"] / more,
        "encode_gb_s": found["encode_gb_s"] * more,
        "decode_gb_s": found["decode_gb_s"] * more,
        "ratio_by_kind": found["ratio_by_kind"],
    }


def rows_of(kind: str, gap: int | str, found: Mapping[str, Mapping[str, Any]]) -> Rows:
    return [{"kind": kind, "gap": gap, "coder": name, **each} for name, each in found.items()]


# -- tables ------------------------------------------------------------------------------------


def leaf_table(rows: Rows, full: bool) -> Iterator[str]:
    """Of all leaf kinds, with or without predecessor."""
    chosen = [row for row in rows if row["kind"] != "state" and (row["gap"] == FULL) == full]
    coders = list(dict.fromkeys(row["coder"] for row in chosen))
    cells = {(row["kind"], row["gap"], row["coder"]): cell(row) for row in chosen}
    yield table_row(["leaf", "gap", *coders])
    yield table_row(["---"] * (2 + len(coders)))
    for kind in ROLES:
        for gap in [FULL] if full else GAPS:
            yield table_row([kind, str(gap), *(cells[kind, gap, coder] for coder in coders)])


def cell(row: Mapping[str, Any]) -> str:
    ratio = f"{100 * row['ratio']:.1f}"
    if "encode_gb_s" not in row:
        return ratio
    return f"{ratio} ({row['encode_gb_s']:.2f} / {row['decode_gb_s']:.2f})"


def state_table(runs: Mapping[str, Rows]) -> Iterator[str]:
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
    runs: dict[str, Rows] = {}
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
        settings = {key: str(value) for key, value in vars(args).items()}
        args.output.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
