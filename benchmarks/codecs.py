"""Ratio and speed of every codec on one core, on the leaves of a simulated AdamW run.

    python benchmarks/codecs.py [--column-mib 4] [--columns 16] [--repeats 7] [--json FILE]

The state is 4-byte master weights, their bfloat16 copy and both moments after some steps on
gradients of random scale per row; the predecessor is the step before. Each column is repeated in
memory until the caches are left behind. Speeds are in GB (1e9 bytes) of raw state a second,
medians over the repeats. ASYMCHECK_NUMBA=0 measures the NumPy kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import Codec, Column, codec_by_name
from asymcheck.codecs.kernels import kernels

CODECS = ("raw", "zstd", "plane", "delta", "topk")
ROW = 1024
State = dict[str, NDArray[np.generic]]


def adamw_states(n: int, steps: int, lr: float = 3e-4, seed: int = 0) -> tuple[State, State]:
    """The last two states of a run: (predecessor, newest)."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(-8, 1.5, (n // ROW, 1))).astype(np.float32)
    w = (0.02 * rng.standard_normal((n // ROW, ROW))).astype(np.float32)
    m, v, before = np.zeros_like(w), np.zeros_like(w), {}
    for step in range(1, steps + 1):
        before = leaves(w, m, v)
        gradient = scale * rng.standard_normal(w.shape, np.float32)
        m = np.float32(0.9) * m + np.float32(0.1) * gradient
        v = np.float32(0.95) * v + np.float32(0.05) * gradient * gradient
        update = m / np.float32(1 - 0.9**step) / (np.sqrt(v / np.float32(1 - 0.95**step)) + 1e-8)
        w = (w * np.float32(1 - 0.1 * lr) - np.float32(lr) * update).astype(np.float32)
    return before, leaves(w, m, v)


def leaves(w: NDArray[np.float32], m: NDArray[np.float32], v: NDArray[np.float32]) -> State:
    return {
        "master f32": w,
        "params bf16": w.astype(ml_dtypes.bfloat16),
        "exp_avg f32": m,
        "exp_avg_sq f32": v,
    }


def columns_of(
    new: NDArray[np.generic], old: NDArray[np.generic], count: int, nbytes: int
) -> list[Column]:
    """`count` columns of `nbytes` with the same content, each in memory of its own."""

    def copies(leaf: NDArray[np.generic]) -> list[NDArray[np.uint8]]:
        data = leaf.reshape(-1).view(np.uint8)[:nbytes]
        return [data.copy() for _ in range(count)]

    return [
        Column("params", new.dtype, n, o) for n, o in zip(copies(new), copies(old), strict=True)
    ]


def median_seconds(run: Callable[[], None], repeats: int) -> float:
    run()  # compiles kernels and warms memory up
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(codec: Codec, columns: list[Column], repeats: int) -> dict[str, float]:
    raw_bytes = sum(column.new.size for column in columns)
    payloads = [memoryview(codec.encode([column])[0]) for column in columns]
    outs = [Column(c.kind, c.dtype, np.empty_like(c.new), c.old) for c in columns]

    def encode() -> None:
        for column in columns:
            codec.encode([column])

    def decode() -> None:
        for out, payload in zip(outs, payloads, strict=True):
            codec.decode([out], [payload])

    encode_s, decode_s = median_seconds(encode, repeats), median_seconds(decode, repeats)
    return {
        "ratio": sum(payload.nbytes for payload in payloads) / raw_bytes,
        "encode_gb_s": raw_bytes / encode_s / 1e9,
        "decode_gb_s": raw_bytes / decode_s / 1e9,
    }


def measure_split(columns: list[Column], repeats: int) -> dict[str, float]:
    """The kernels alone, without any coder."""
    raw_bytes = sum(column.new.size for column in columns)
    width = columns[0].dtype.itemsize
    planes = np.empty(columns[0].new.size, np.uint8)
    pairs = [(c.new.view(f"<u{width}"), c.old.view(f"<u{width}")) for c in columns]
    merged = np.empty_like(pairs[0][0])
    calls: dict[str, Callable[[NDArray, NDArray], None]] = {
        "split": lambda new, old: kernels().split(new, planes),
        "split_difference": lambda new, old: kernels().split_difference(new, old, planes),
        "merge": lambda new, old: kernels().merge(list(planes.reshape(width, -1)), merged),
        "merge_difference": lambda new, old: kernels().merge_difference(
            list(planes.reshape(width, -1)), merged
        ),
    }

    def over_all(call: Callable[[NDArray, NDArray], None]) -> Callable[[], None]:
        return lambda: [call(new, old) for new, old in pairs] and None

    return {
        f"{name}_gb_s": raw_bytes / median_seconds(over_all(call), repeats) / 1e9
        for name, call in calls.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--column-mib", type=int, default=4, help="size of a column")
    parser.add_argument("--columns", type=int, default=16, help="columns of each leaf")
    parser.add_argument("--repeats", type=int, default=7, help="the median of so many is shown")
    parser.add_argument("--steps", type=int, default=60, help="steps of the simulated run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    nbytes = args.column_mib << 20
    before, newest = adamw_states(nbytes // 2, args.steps)  # enough for bfloat16, too
    print(f"{type(kernels()).__name__}, columns of {args.column_mib} MiB\n")
    print("| leaf | codec | ratio | encode GB/s | decode GB/s |\n| --- | --- | --- | --- | --- |")
    rows: list[dict[str, object]] = []
    for leaf, new in newest.items():
        columns = columns_of(new, before[leaf], args.columns, nbytes)
        for name in CODECS:
            found = measure(codec_by_name(name), columns, args.repeats)
            rows.append({"leaf": leaf, "codec": name, **found})
            print(
                f"| {leaf} | {name} | {found['ratio']:.4f} "
                f"| {found['encode_gb_s']:.2f} | {found['decode_gb_s']:.2f} |",
                flush=True,
            )
    columns = columns_of(newest["master f32"], before["master f32"], args.columns, nbytes)
    split = measure_split(columns, args.repeats)
    print("\nkernels alone: " + ", ".join(f"{k[:-5]} {v:.1f} GB/s" for k, v in split.items()))
    if args.json:
        args.json.write_text(json.dumps({"codecs": rows, "kernels": split}, indent=1))


if __name__ == "__main__":
    main()
