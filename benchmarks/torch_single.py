"""GPT-2 small on one machine: what a checkpoint costs training, side by side with the others.

Every variant trains the same model in a process of its own; rounds go through all variants in
turn, so that a noisy neighbour disturbs all alike, and every figure is related to the run without
checkpoints of the same round. Medians over the rounds go into a table (Markdown), JSON and a plot.

    python benchmarks/torch_single.py --rounds 3 --output build/torch_single

Variants of DCP: thread and process as shipped; "shm" with shared memory and a reused stager;
"shm-async" also stages in the background, as shipped, *without* a barrier before the update, so
that its copy may be torn; "shm-async-barrier" waits for the staging before the update.
"asymcheck-replay" stores the fewest bytes, whatever that takes. With `--threads 1` training leaves
a core to others, as it does under a GPU; with `--write-mbps` AsymCheck's store is as slow as one
behind a link (it sleeps); those of the others stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import asymcheck
import asymcheck_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(1, str(Path(__file__).parent / "common"))
from gpt2 import GPT2, SMALL, TINY
from latency import slow_writes
from machine import MemoryPeak, drop_caches
from strategies import REPLAY, strategy_of
from traffic import flushed_nbytes

ASYMCHECK = ("asymcheck-naive", "asymcheck-s", "asymcheck", REPLAY)
VARIANTS = (
    "none",
    "torch.save",
    "dcp-thread",
    "dcp-process",
    "dcp-shm",
    "dcp-shm-async",
    "dcp-shm-async-barrier",
    *ASYMCHECK,
)
WARMUP_STEPS = 2
WARMUP_CHECKPOINTS = 2  # they start processes and touch memory for the first time
RESTORES = 3


# -- one variant, in a process of its own ------------------------------------------------------


class NoCheckpoints:
    def before_update(self) -> float:
        """Seconds spent waiting before the optimizer's step."""
        return 0.0

    def after_update(self, step: int) -> float:
        """Seconds for which the call after the optimizer's step held up training."""
        return 0.0

    def finish(self, timed: range) -> dict[str, Any]:
        """Results of the checkpoints of the timed steps; waits until all are durable."""
        return {}


class Rival(NoCheckpoints):
    """torch.save or DCP, saved to a directory of its own for every step; the last one is kept."""

    def __init__(self, args: argparse.Namespace, model: Any, optimizer: Any) -> None:
        self._args, self._model, self._optimizer = args, model, optimizer
        self._pending: Any = None
        self._saved: list[Path] = []
        self._begun_s = 0.0
        self._durable_s: list[float] = []
        self._staging: Any = None
        self._stager = self._make_stager()

    def _make_stager(self) -> Any:
        if "shm" not in self._args.variant:
            return None
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging="async" in self._args.variant,
                use_non_blocking_copy=False,
            )
        )

    def before_update(self) -> float:
        if "barrier" not in self._args.variant or self._staging is None:
            return 0.0
        begun_s = time.perf_counter()
        self._staging.result()
        return time.perf_counter() - begun_s

    def after_update(self, step: int) -> float:
        if step % self._args.every:
            return 0.0
        begun_s = time.perf_counter()
        self._wait()
        target = self._args.directory / f"step-{step}"
        self._begun_s = time.perf_counter()
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        if self._args.variant == "torch.save":
            self._torch_save(state, target)
        else:
            self._dcp_save(state, target)
        stall_s = time.perf_counter() - begun_s
        self._saved.append(target)
        while len(self._saved) > 2:
            shutil.rmtree(self._saved.pop(0), ignore_errors=True)
        return stall_s

    def _torch_save(self, state: Any, target: Path) -> None:
        target.mkdir()
        with (target / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self._durable_s.append(time.perf_counter() - self._begun_s)

    def _dcp_save(self, state: Any, target: Path) -> None:
        process = self._args.variant != "dcp-thread"
        kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        response = dcp.async_save(
            state, checkpoint_id=target, async_checkpointer_type=kind, async_stager=self._stager
        )
        if hasattr(response, "upload_completion"):
            self._staging, response = response.staging_completion, response.upload_completion
        begun_s = self._begun_s
        response.add_done_callback(lambda _: self._durable_s.append(time.perf_counter() - begun_s))
        self._pending = response

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def finish(self, timed: range) -> dict[str, Any]:
        self._wait()
        stored = sum(f.stat().st_size for f in self._saved[-1].rglob("*") if f.is_file())
        if self._stager is not None:
            self._stager.close()
        return {"durable_s": self._durable_s, "stored": stored, "last": str(self._saved[-1])}


class Ours(NoCheckpoints):
    def __init__(self, args: argparse.Namespace, model: Any, optimizer: Any) -> None:
        self._args = args
        self._checkpointer = asymcheck_torch.attach(
            model,
            optimizer,
            url=args.directory,
            every_steps=args.every,
            strategy=strategy_of(args.variant),
            max_to_keep=2,
            max_host_bytes=args.max_host_bytes,
        )

    def finish(self, timed: range) -> dict[str, Any]:
        self._checkpointer.wait()
        stalls = dict(self._checkpointer.stall_s)
        host = self._checkpointer.checkpointer.host_nbytes
        saved = [step for step in timed if step % self._args.every == 0]
        events = self._checkpointer.checkpointer.trace.events()
        self._checkpointer.close()
        stats = stats_of(self._args.directory, saved[-1])
        return {
            "stall_s": [stalls[step] for step in saved],
            "durable_s": [stats["durable_after_s"]],
            "stored": flushed_nbytes(events, saved),
            "in_window": stats["in_window_nbytes"] / stats["raw_nbytes"],
            "host_nbytes": host,
            "codecs": sorted({d["codec"] for d in stats["decisions"]}),
            "last": str(self._args.directory),
        }


def stats_of(directory: Path, step: int) -> dict[str, Any]:
    with asymcheck.open_checkpoint(directory, step) as checkpoint:
        return checkpoint.chain[0].manifests[0].stats


def build(args: argparse.Namespace) -> tuple[GPT2, torch.optim.Optimizer, Callable[[], Any]]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = TINY if args.small else SMALL
    model = GPT2(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def batch() -> Any:
        tokens = torch.randint(config.vocabulary, (args.batch, args.length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return model, optimizer, batch


def join_group() -> None:
    """A process group of one: DCP's process executor asks for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=0, world_size=1)


def run_variant(args: argparse.Namespace) -> None:
    if args.variant.startswith("dcp"):
        join_group()
    model, optimizer, batch = build(args)
    for _ in range(WARMUP_STEPS):
        one_step(model, optimizer, batch, NoCheckpoints(), 0)
    memory = MemoryPeak()
    if args.variant == "none":
        checkpoints: NoCheckpoints = NoCheckpoints()
    elif args.variant in ASYMCHECK:
        checkpoints = Ours(args, model, optimizer)
    else:
        checkpoints = Rival(args, model, optimizer)
    first = WARMUP_CHECKPOINTS * args.every + 1
    for step in range(1, first):
        one_step(model, optimizer, batch, checkpoints, step)
    timed = range(first, first + args.steps)
    begun_s = time.perf_counter()
    stalls = {step: one_step(model, optimizer, batch, checkpoints, step) for step in timed}
    seconds = time.perf_counter() - begun_s
    one_step(model, optimizer, batch, checkpoints, timed.stop)  # what the last one left behind
    result = {"step_s": seconds / args.steps, **checkpoints.finish(timed)}
    result.setdefault("stall_s", [s for step, s in stalls.items() if step % args.every == 0])
    result["peak_extra"] = memory.stop()
    print(json.dumps(result))


def one_step(
    model: Any, optimizer: Any, batch: Callable[[], Any], checkpoints: NoCheckpoints, step: int
) -> float:
    tokens, targets = batch()
    model(tokens, targets).backward()
    waited_s = checkpoints.before_update()
    optimizer.step()
    optimizer.zero_grad()
    return waited_s + checkpoints.after_update(step)


def run_restore(args: argparse.Namespace) -> None:
    """Restore into a fresh model from a cold page cache; and read the same files raw."""
    model, optimizer, batch = build(args)
    last = Path(args.last)
    one_step(model, optimizer, batch, NoCheckpoints(), 0)  # optimizer state exists, as in a restart
    files = sorted(f for f in last.rglob("*") if f.is_file() and f.stat().st_size > 1 << 16)
    if args.variant in ASYMCHECK:  # two steps are kept: read one
        newest = max(f.parent.name for f in files)
        files = [f for f in files if f.parent.name == newest]
    restores_s: list[float] = []
    reads_s: list[float] = []
    for _ in range(RESTORES):
        drop_caches()
        begun_s = time.perf_counter()
        restore(args, last, model, optimizer)
        restores_s.append(time.perf_counter() - begun_s)
        drop_caches()
        reads_s.append(read_raw(files))
    print(json.dumps({"restore_s": restores_s, "raw_read_s": reads_s}))


def restore(args: argparse.Namespace, last: Path, model: Any, optimizer: Any) -> None:
    if args.variant in ASYMCHECK:
        with asymcheck_torch.attach(model, optimizer, url=last) as checkpointer:
            checkpointer.restore()
    elif args.variant == "torch.save":
        state = torch.load(last / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=last)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


def read_raw(files: list[Path]) -> float:
    """Seconds to read files with two threads into one reused buffer each: the disk's own speed."""
    from concurrent.futures import ThreadPoolExecutor

    def read(path: Path) -> None:
        buffer = bytearray(8 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, files))
    return time.perf_counter() - begun_s


# -- the parent --------------------------------------------------------------------------------


def child(args: argparse.Namespace, **options: object) -> dict[str, Any]:
    command = [sys.executable, __file__]
    for name in ("batch", "length", "steps", "max_host_bytes", "threads", "write_mbps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.small:
        command.append("--small")
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for every in args.every_list:
        for round_number in range(args.rounds):
            for variant in args.variants:
                with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
                    result = child(args, variant=variant, every=every, directory=directory)
                    first = (every, round_number) == (args.every_list[0], 0)
                    if variant != "none" and first:  # the same files every time: once is enough
                        result |= child(
                            args, variant=variant, every=every, restore=1, last=result["last"]
                        )
                result |= {"variant": variant, "every": every, "round": round_number}
                results.append(result)
                args.output.with_suffix(".runs.jsonl").open("a").write(json.dumps(result) + "\n")
                line = f"round {round_number + 1} every {every} {variant}: "
                line += (
                    f"{result['step_s']:.3f} s/step, stall {mean(result['stall_s'] or [0]):.3f} s"
                )
                print(line, file=sys.stderr, flush=True)
    return results


def summarise(args: argparse.Namespace, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {(r["round"], r["every"]): r["step_s"] for r in results if r["variant"] == "none"}
    rows: list[dict[str, Any]] = []
    for every in args.every_list:
        for variant in args.variants:
            runs = [r for r in results if (r["variant"], r["every"]) == (variant, every)]
            ratios = [r["step_s"] / plain[r["round"], every] for r in runs]
            row: dict[str, Any] = {
                "variant": variant,
                "every": every,
                "step_s": median(r["step_s"] for r in runs),
                "step_ratio": median(ratios),
                "step_ratio_range": [min(ratios), max(ratios)],
            }
            if variant != "none":
                row["stall_s"] = median(median(r["stall_s"]) for r in runs)
                row["stall_mean_s"] = median(mean(r["stall_s"]) for r in runs)
                row["durable_s"] = median(median(r["durable_s"]) for r in runs)
                row["stored_nbytes"] = median(r["stored"] for r in runs)
                row["peak_extra_nbytes"] = median(r["peak_extra"] for r in runs)
            if "restore_s" in runs[0]:
                restores_s = runs[0]["restore_s"]
                row["restore_s"] = median(restores_s)
                row["restore_share_of_disk"] = median(
                    read_s / restore_s
                    for read_s, restore_s in zip(runs[0]["raw_read_s"], restores_s, strict=True)
                )
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| every | variant | step ratio (range) | stall median / mean, ms | % of a step "
        "| durable, s | stored, GB | extra memory, GB | restore, s | of disk speed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = {row["every"]: row["step_s"] for row in rows if row["variant"] == "none"}
    for row in rows:
        low, high = row["step_ratio_range"]
        cells = [
            str(row["every"]),
            row["variant"],
            f"{row['step_ratio']:.2f} ({low:.2f}–{high:.2f})",
        ]
        if row["variant"] == "none":
            cells[2] = f"1 ({row['step_s']:.2f} s)"
            cells += ["–"] * 7
        else:
            share = 100 * row["stall_mean_s"] / plain[row["every"]]
            cells += [
                f"{row['stall_s'] * 1e3:.0f} / {row['stall_mean_s'] * 1e3:.0f}",
                f"{share:.1f}",
                f"{row['durable_s']:.2f}",
                f"{row['stored_nbytes'] / 1e9:.2f}",
                f"{row['peak_extra_nbytes'] / 1e9:.2f}",
                f"{row['restore_s']:.2f}" if "restore_s" in row else "–",
                f"{row['restore_share_of_disk']:.2f}" if "restore_s" in row else "–",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    everies = sorted({row["every"] for row in rows})
    figure, axes = plt.subplots(len(everies), 2, figsize=(11, 3.4 * len(everies)), squeeze=False)
    for line, every in zip(axes, everies, strict=True):
        chosen = [r for r in rows if r["every"] == every and r["variant"] != "none"]
        names = [r["variant"] for r in chosen]
        colours = ["#0072b2" if n.startswith("asym") else "#999999" for n in names]
        line[0].barh(names, [r["step_ratio"] for r in chosen], color=colours)
        line[0].axvline(1, color="black", linewidth=0.8)
        line[0].set_xlabel(f"step time / without checkpoints (every {every})")
        line[1].barh(names, [r["stall_mean_s"] * 1e3 for r in chosen], color=colours)
        line[1].set_xlabel("mean stall per checkpoint, ms")
        line[1].set_yticklabels([])
        for axis in line:
            axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = measure(args)
    rows = summarise(args, results)
    document = {"rows": rows, "runs": results, "torch": torch.__version__}
    args.output.with_suffix(".json").write_text(json.dumps(document, indent=1))
    plot(rows, args.output.with_suffix(".png"))
    print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--every-list", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--max-host-bytes", type=int, default=4 << 30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of training")
    parser.add_argument("--write-mbps", type=float, default=math.inf, help="of AsymCheck's store")
    parser.add_argument("--small", action="store_true", help="10 M parameters, for a quick look")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go (default: temporary)")
    parser.add_argument("--output", type=Path, default=Path("build/torch_single"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--restore", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.restore:
        run_restore(arguments)
    elif arguments.variant:
        with slow_writes(arguments.write_mbps * 1e6):
            run_variant(arguments)
    else:
        main(arguments)
