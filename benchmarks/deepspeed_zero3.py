"""GPT-2 small under ZeRO-3 on two ranks with a checkpoint at every step: AsymCheck and others.

Every variant trains in processes of its own, in turn, in rounds: a few steps that are not timed,
then timed ones, all of them saved; then, in new processes, the newest checkpoint is loaded from a
cold page cache. The last save counts for nobody, since no forward pass follows in which it could be
copied. With `--latency-ms` every collective takes at least so much longer, slept, as over a link
between machines (`asymcheck_torch.testing.slow_collectives`), in all variants alike. With
`--write-mbps` AsymCheck's store is as slow as one behind a link that both ranks share.

    python benchmarks/deepspeed_zero3.py --rounds 3 --output build/deepspeed_zero3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(1, str(Path(__file__).parent / "common"))

VARIANTS = (
    *("none", "deepspeed", "dcp-async"),
    *("asymcheck-naive", "asymcheck", "asymcheck-replay"),
)
WARM_UP_STEPS = 2


# -- one rank ----------------------------------------------------------------------------------


def make_engine(args: argparse.Namespace) -> Any:
    import deepspeed
    import torch
    from gpt2 import GPT2, SMALL, TINY

    torch.set_num_threads(1)
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = GPT2(TINY if args.small else SMALL)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-4),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000,
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 5_000_000,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
        },
    )
    return engine


class Saver:
    """What a variant does after a step; the seconds for which it held training."""

    def __init__(self, args: argparse.Namespace, engine: Any) -> None:
        self._args, self._engine = args, engine
        self._checkpointer: Any = None
        self._future: Any = None
        self._group: Any = None
        self.stall_s: list[float] = []
        if args.variant == "dcp-async":
            import torch.distributed as dist

            # Its collectives run on a thread of their own: on training's group they would meet
            # those of training in another order on every rank.
            self._group = dist.new_group(backend="gloo")
        if args.variant.startswith("asymcheck"):
            from strategies import strategy_of

            import asymcheck_torch

            self._checkpointer = asymcheck_torch.attach(
                engine,
                url=args.directory / "run",
                strategy=strategy_of(args.variant),
                max_to_keep=2,
            )

    def after_step(self, step: int) -> None:
        begun_s = time.perf_counter()
        if self._args.variant == "deepspeed":
            self._engine.save_checkpoint(str(self._args.directory), tag=f"step{step % 2}")
        elif self._args.variant == "dcp-async":
            self._dcp(step)
        if self._checkpointer is None:
            self.stall_s.append(time.perf_counter() - begun_s)

    def _dcp(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        if self._future is not None:
            self._future.result()
        path = self._args.directory / f"step{step % 2}"
        self._future = dcp.async_save(
            dcp_state(self._engine), checkpoint_id=path, process_group=self._group
        )

    def finish(self) -> dict[str, Any]:
        if self._future is not None:
            self._future.result()
        if self._checkpointer is None:
            return {}
        self._checkpointer.wait()
        stall_s = self._checkpointer.stall_s
        self.stall_s = list(stall_s.values())
        events = self._checkpointer.checkpointer.trace.events()
        self._checkpointer.close()
        from traffic import flushed_nbytes

        from asymcheck.inspection.timeline import window_nbytes

        inside, all_of_them = window_nbytes(events)
        return {
            "window_share": inside / max(1, all_of_them),
            "flushed_nbytes": flushed_nbytes(events, list(stall_s)[self._args.warm_up_steps :]),
        }


def dcp_state(engine: Any) -> dict[str, Any]:
    """The flat tensors of this rank, under names of its own: DCP knows nothing of ZeRO."""
    import torch

    zero, rank = engine.optimizer, torch.distributed.get_rank()
    found: dict[str, Any] = {}
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        found[f"{rank}.{number}.master"] = flat.detach()
        for key, value in zero.optimizer.state[flat].items():
            found[f"{rank}.{number}.{key}"] = value
    return found


def run_saves(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from latency import slow_writes

    from asymcheck_torch.testing import slow_collectives

    engine = make_engine(args)
    vocabulary = engine.module.wte.num_embeddings
    tokens = torch.randint(vocabulary, (1, args.length + 1))
    saver = Saver(args, engine)
    step_s: list[float] = []
    slow = slow_collectives(args.latency_ms / 1e3) if args.latency_ms else nullcontext()
    with slow, slow_writes(args.write_mbps / 2 * 1e6):
        for step in range(args.warm_up_steps + args.steps):
            begun_s = time.perf_counter()
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
            engine.step()
            saver.after_step(step)
            step_s.append(time.perf_counter() - begun_s)
    result = saver.finish()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result | {
        "step_s": step_s[args.warm_up_steps :],
        "stall_s": saver.stall_s[args.warm_up_steps :],
    }


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp
    from machine import drop_caches

    import asymcheck_torch

    engine = make_engine(args)
    if args.variant == "dcp-async":  # the moments must be there to be loaded into
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            state = engine.optimizer.optimizer.state[flat]
            state |= {"step": torch.tensor(0.0)}
            state |= {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
    drop_caches()
    torch.distributed.barrier()
    begun_s = time.perf_counter()
    if args.variant == "deepspeed":
        path, _ = engine.load_checkpoint(str(args.directory))
        assert path is not None
    elif args.variant == "dcp-async":
        dcp.load(dcp_state(engine), checkpoint_id=args.directory / "step1")
    else:
        with asymcheck_torch.attach(engine, url=args.directory / "run") as checkpointer:
            assert checkpointer.restore() == args.warm_up_steps + args.steps
    seconds = time.perf_counter() - begun_s
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"load_s": seconds}


# -- the parent --------------------------------------------------------------------------------


def in_processes(args: argparse.Namespace, variant: str, part: str, directory: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--variant", variant, "--part", part]
    command += ["--directory", directory]
    for name in ("steps", "warm_up_steps", "length", "latency_ms", "write_mbps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--small"] if args.small else []
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error", "PYTHONWARNINGS": "ignore"}
    shared |= {"OMP_NUM_THREADS": 1, "TORCH_EXTENSIONS_DIR": f"{directory}/extensions"}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
        )
        for r in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{variant} {part}: exit codes {[p.returncode for p in processes]}")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for variant in args.variants:
            with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
                ranks = in_processes(args, variant, "saves", directory)
                result = {"variant": variant, "round": number, "ranks": ranks}
                if variant != "none":
                    result["stored_nbytes"] = stored_nbytes(Path(directory), ranks)
                    result["load"] = in_processes(args, variant, "load", directory)
            results.append(result)
            print(f"round {number + 1} {variant}", file=sys.stderr, flush=True)
    return results


def stored_nbytes(directory: Path, ranks: list[dict[str, Any]]) -> float:
    """Bytes of a checkpoint."""
    if "flushed_nbytes" in ranks[0]:
        return sum(rank["flushed_nbytes"] for rank in ranks)
    files = (directory / "step1").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def timed(result: dict[str, Any], key: str, rank: int = 0) -> list[float]:
    """The seconds of a rank's steps but for the last, which has nobody after it."""
    return result["ranks"][rank][key][:-1]


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | step ratio | stall median / mean, ms | % of a step | stored, GB | load, s "
        "| copied in windows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = {r["round"]: mean(timed(r, "step_s")) for r in results if r["variant"] == "none"}
    for variant in args.variants:
        runs = [r for r in results if r["variant"] == variant]
        ratio = median(mean(timed(r, "step_s")) / plain[r["round"]] for r in runs)
        if variant == "none":
            lines.append(f"| none | 1 ({median(plain.values()):.2f} s) | – | – | – | – | – |")
            continue
        worst = [max((timed(r, "stall_s", k) for k in (0, 1)), key=mean) for r in runs]
        stall_ms = 1e3 * median(map(median, worst))
        mean_ms = 1e3 * median(map(mean, worst))
        share = median(mean(w) / plain[r["round"]] for r, w in zip(runs, worst, strict=True))
        stored = median(r["stored_nbytes"] for r in runs) / 1e9
        load_s = median(max(rank["load_s"] for rank in r["load"]) for r in runs)
        windows = [r["ranks"][0].get("window_share") for r in runs]
        inside = "–" if windows[0] is None else f"{100 * median(windows):.0f} %"
        lines.append(
            f"| {variant} | {ratio:.2f} | {stall_ms:.0f} / {mean_ms:.0f} | {100 * share:.1f} "
            f"| {stored:.2f} | {load_s:.2f} | {inside} |"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = measure(args)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1))
    print(table(args, results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="even: tags take turns")
    parser.add_argument("--warm-up-steps", type=int, default=WARM_UP_STEPS, help="are not timed")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="added to each collective")
    parser.add_argument("--write-mbps", type=float, default=math.inf, help="of AsymCheck's store")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--small", action="store_true", help="2 M parameters, for a quick look")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go (default: temporary)")
    parser.add_argument("--output", type=Path, default=Path("build/deepspeed_zero3"))
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.variant:
        part = run_saves if arguments.part == "saves" else run_load
        print(json.dumps(part(arguments)))
    else:
        main(arguments)
