"""Train GPT-2 with DeepSpeed ZeRO-3 on two ranks, kill one of them in the middle of a save, resume.

Four runs, each in processes of its own:

1. *reference*: two ranks, never interrupted, no checkpoints;
2. *killed*: AsymCheck attached to the engine, a checkpoint at every step; rank 1 is killed with
   SIGKILL while the packs of a step are being written, and rank 0 finds out;
3. *resumed*: two ranks again; they recover from the newest good step and go on;
4. *alone*: one rank opens the last checkpoint of two, and trains on.

The exit code is 0 only if losses and final weights of 3 equal those of 1 bit for bit, and the
weights that 4 starts from are those that 3 ended with.

    python examples/train_deepspeed.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from train_gpt2 import english_text, last, losses, say, torn_steps

END_S = 120.0  # a rank that outlives another ends within this time


# -- one rank ----------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    import deepspeed
    import torch
    from gpt2 import GPT2, TINY, ByteBatches

    torch.set_num_threads(1)
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = GPT2(TINY)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-4),
        config={
            "train_micro_batch_size_per_gpu": args.batch,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    rank = torch.distributed.get_rank()
    batches = ByteBatches(english_text(None), batch=args.batch, context=64, seed=1 + rank)
    if args.run == "reference":
        train_steps(args, engine, batches, start=0)
    else:
        train_with_checkpoints(args, engine, batches)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_with_checkpoints(args: argparse.Namespace, engine: Any, batches: Any) -> None:
    import asymcheck_torch

    with asymcheck_torch.attach(
        engine,
        url=args.directory / "checkpoints",
        extra_state={"data": batches},
        commit_timeout_s=20.0,
    ) as checkpointer:
        begun_s = time.perf_counter()
        start = checkpointer.restore()
        seconds = time.perf_counter() - begun_s
        say_once(event="start", step=start, recover_s=seconds, weights=digest(engine))
        train_steps(args, engine, batches, start)
        checkpointer.wait()
        say_once(event="stalls", stall_s=list(checkpointer.stall_s.values()))


def train_steps(args: argparse.Namespace, engine: Any, batches: Any, start: int) -> None:
    """The training loop: there is nothing of AsymCheck in it."""
    for step in range(start + 1, args.steps + 1):
        begun_s = time.perf_counter()
        tokens, targets = next(batches)
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        seconds = time.perf_counter() - begun_s
        say_once(event="step", step=step, loss=loss.item().hex(), seconds=seconds)
    say_once(event="end", weights=digest(engine))


def digest(engine: Any) -> str:
    """SHA-256 over the bytes of all parameters, gathered from all ranks."""
    import deepspeed

    sha = hashlib.sha256()
    for name, parameter in sorted(engine.module.named_parameters()):
        with deepspeed.zero.GatheredParameters([parameter]):
            sha.update(name.encode() + parameter.detach().numpy().tobytes())
    return sha.hexdigest()


def say_once(**event: object) -> None:
    """Rank 0 tells the parent process."""
    if os.environ["RANK"] == "0":
        say(**event)


# -- the parent: starts ranks, kills one, compares ---------------------------------------------


def start(args: argparse.Namespace, name: str, ranks: int, steps: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--run", name, "--directory", str(args.directory)]
    command += ["--steps", str(steps), "--batch", str(args.batch)]
    shared = {
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
        "DS_LOG_LEVEL": "error",
        "OMP_NUM_THREADS": 1,
        "PYTHONWARNINGS": "ignore",
        "TORCH_EXTENSIONS_DIR": args.directory / "extensions",
    }
    processes: list[Any] = []
    for rank in range(ranks):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        out = subprocess.PIPE if rank == 0 else sys.stderr
        processes.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    return processes


def run(
    args: argparse.Namespace, name: str, ranks: int, steps: int, kill_after: int | None = None
) -> list[dict[str, Any]]:
    """Run to the end, or until rank 1 is killed; the events that rank 0 told."""
    processes = start(args, name, ranks, steps)
    events: list[dict[str, Any]] = []
    for line in processes[0].stdout:
        if not line.startswith('{"event"'):
            continue  # DeepSpeed prints there, too
        events.append(json.loads(line))
        step = events[-1].get("step", 0)
        if events[-1]["event"] == "step" and (step % 10 == 0 or step == steps):
            print(f"{name:9} step {step:3}/{steps}", file=sys.stderr, flush=True)
        if kill_after is not None and events[-1]["event"] == "step" and step >= kill_after:
            kill_in_save(processes, args.directory / "checkpoints")
            break
    codes = [process.wait(END_S) for process in processes]
    if kill_after is None and any(codes):
        sys.exit(f"the {name} run ended with exit codes {codes}")
    if kill_after is not None and (codes[0] in (0, None) or codes[1] != -signal.SIGKILL):
        sys.exit(f"rank 0 did not notice that rank 1 is gone: exit codes {codes}")
    return events


def kill_in_save(processes: list[Any], root: Path) -> None:
    """SIGKILL to rank 1 as soon as packs of a step lie in the store and its commit does not."""
    while processes[1].poll() is None:
        if torn_steps(root):
            processes[1].send_signal(signal.SIGKILL)
            return
        time.sleep(0.0005)
    sys.exit("the run ended before it could be killed in the middle of a save")


def main(args: argparse.Namespace) -> int:
    reference = run(args, "reference", 2, args.steps)
    killed = run(args, "killed", 2, args.steps, kill_after=args.steps // 2)
    torn = torn_steps(args.directory / "checkpoints")
    resumed = run(args, "resumed", 2, args.steps)
    alone = run(args, "alone", 1, args.steps + 2)
    later = losses(resumed)
    expected = {step: loss for step, loss in losses(reference).items() if step in later}
    end = last(resumed, "end")["weights"]
    same = {
        "losses after recovery bit-identical": later == expected and bool(later),
        "final weights bit-identical": end == last(reference, "end")["weights"],
        "one rank starts from the weights of two": last(alone, "start")["weights"] == end,
        "and trains on": sorted(losses(alone)) == [args.steps + 1, args.steps + 2],
    }
    stalls = last(resumed, "stalls")["stall_s"]
    begun = last(resumed, "start")
    print(
        f"rank 1 killed after step {max(losses(killed))}; torn {sorted(torn)}; resumed from step "
        f"{begun['step']} in {begun['recover_s']:.2f} s; stall per checkpoint: median "
        f"{median(stalls) * 1e3:.1f} ms, mean {mean(stalls) * 1e3:.1f} ms"
    )
    for what, holds in same.items():
        print(f"{what:40} {'yes' if holds else 'NO'}")
    return 0 if all(same.values()) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step and rank")
    parser.add_argument("--directory", type=Path, help="where to write (default: a new one)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.directory is None:
        args.directory = Path(tempfile.mkdtemp(prefix="asymcheck-deepspeed-"))
    return args


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    if arguments.run is not None:
        train(arguments)
    else:
        sys.exit(main(arguments))
