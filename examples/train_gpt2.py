"""Train a small GPT-2 with a checkpoint at every step, kill it in the middle of a save, resume.

Three runs of the same training, each in a process of its own:

1. *reference*: never interrupted, no checkpoints;
2. *killed*: AsymCheck attached, killed with SIGKILL while the packs of a step are being written;
3. *resumed*: the same command again; it recovers from the newest good step and goes on.

At the end the losses and the final weights of 3 must equal those of 1 bit for bit; the exit code
is 0 only then. A report and a timeline (PNG) say what the checkpoints cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from gpt2 import GPT2, TINY, ByteBatches

import asymcheck
import asymcheck_torch
from asymcheck.plot import plot_timeline


def english_text(path: Path | None) -> bytes:
    """The text to train on: a file, or the manual pages that come with Python itself."""
    if path is not None:
        return path.read_bytes()
    return "\n".join(pydoc_data.topics.topics.values()).encode()


# -- one training run (a process of its own) ---------------------------------------------------


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(args.threads)
    model = GPT2(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    text = english_text(args.text)
    batches = ByteBatches(text, batch=args.batch, context=TINY.context, seed=1)
    if args.run == "reference":
        train_steps(args, model, optimizer, schedule, batches, start=0)
        return
    checkpointer = asymcheck_torch.attach(
        model,
        optimizer,
        url=args.directory / "checkpoints",
        strategy=args.strategy,
        extra_state={"data": batches, "schedule": schedule},
        max_to_keep=5,
    )
    with checkpointer:
        begun_s = time.perf_counter()
        start = checkpointer.restore()
        say(event="start", step=start, recover_s=time.perf_counter() - begun_s)
        train_steps(args, model, optimizer, schedule, batches, start)
        checkpointer.wait()
        say(event="stalls", stall_s=list(checkpointer.stall_s.values()))
        plot_timeline(
            checkpointer.checkpointer.trace.events(),
            args.directory / "timeline.png",
            first_step=args.steps - 3,
            last_step=args.steps - 1,
        )


def train_steps(
    args: argparse.Namespace,
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: ByteBatches,
    start: int,
) -> None:
    """The training loop: there is nothing of AsymCheck in it."""
    for step in range(start + 1, args.steps + 1):
        begun_s = time.perf_counter()
        tokens, targets = next(batches)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        say(event="step", step=step, loss=loss.item().hex(), seconds=time.perf_counter() - begun_s)
    say(event="end", weights=digest(model))


def digest(model: GPT2) -> str:
    """SHA-256 over the bytes of all parameters."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().numpy().tobytes())
    return sha.hexdigest()


def say(**event: object) -> None:
    """Tell the parent process."""
    print(json.dumps(event), flush=True)


# -- the parent: runs, kills, compares ---------------------------------------------------------


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line now and then."""

    def __init__(self, run: str, steps: int) -> None:
        self._run, self._steps = run, steps
        self._terminal = sys.stderr.isatty()

    def show(self, event: dict[str, Any]) -> None:
        step = event["step"]
        done = step == self._steps
        text = f"{self._run:9} step {step:3}/{self._steps}  "
        text += f"loss {float.fromhex(event['loss']):.4f}  {event['seconds']:.2f} s/step"
        if self._terminal:
            print(f"\r{text}", end="\n" if done else "", file=sys.stderr, flush=True)
        elif done or step % 10 == 0:
            print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, name: str, kill_after: int | None = None) -> list[dict[str, Any]]:
    """Run one training process to its end (or its death); the events it told."""
    command = [sys.executable, __file__, "--run", name, "--directory", str(args.directory)]
    for option in ("steps", "batch", "threads", "strategy"):
        command += [f"--{option}", str(getattr(args, option))]
    if args.text is not None:
        command += ["--text", str(args.text)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    progress = Progress(name, args.steps)
    events: list[dict[str, Any]] = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "step":
            progress.show(events[-1])
            if kill_after is not None and events[-1]["step"] >= kill_after:
                kill_in_save(process, args.directory / "checkpoints")
                break
    code = process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        sys.exit(f"the {name} run ended with exit code {code}")
    return events


def kill_in_save(process: subprocess.Popen[str], root: Path) -> None:
    """SIGKILL as soon as packs of a step lie in the store and its commit record does not."""
    while process.poll() is None:
        if torn_steps(root):
            process.send_signal(signal.SIGKILL)
            return
        time.sleep(0.0005)
    sys.exit("the run ended before it could be killed in the middle of a save")


def torn_steps(root: Path) -> set[int]:
    """Steps with packs but no commit record (older ones are being removed by the retention)."""
    newest = max(steps_committed(root), default=-1)
    return {step for step in steps_in_data(root) if step > newest}


def steps_in_data(root: Path) -> set[int]:
    return {int(path.parent.name.split("-")[0]) for path in root.glob("data/*/*.pack")}


def steps_committed(root: Path) -> set[int]:
    return {int(path.stem) for path in root.glob("commits/*.json")}


def losses(events: list[dict[str, Any]]) -> dict[int, str]:
    return {e["step"]: e["loss"] for e in events if e["event"] == "step"}


def last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [e for e in events if e["event"] == kind][-1]


def main(args: argparse.Namespace) -> int:
    kill_after = args.steps // 2
    reference = run(args, "reference")
    killed = run(args, "killed", kill_after)
    torn = torn_steps(args.directory / "checkpoints")
    print(f"killed with SIGKILL while step {max(torn, default='?')} was being saved")
    resumed = run(args, "resumed")
    same_losses = losses(resumed) == {
        step: loss for step, loss in losses(reference).items() if step in losses(resumed)
    }
    same_weights = last(resumed, "end")["weights"] == last(reference, "end")["weights"]
    report(args, reference, killed, resumed, torn)
    print(f"losses after recovery bit-identical: {'yes' if same_losses else 'NO'}")
    print(f"final weights bit-identical:         {'yes' if same_weights else 'NO'}")
    return 0 if same_losses and same_weights and torn else 1


def report(
    args: argparse.Namespace,
    reference: list[dict[str, Any]],
    killed: list[dict[str, Any]],
    resumed: list[dict[str, Any]],
    torn: set[int],
) -> None:
    stalls = last(resumed, "stalls")["stall_s"]
    start = last(resumed, "start")
    plain_s = median(e["seconds"] for e in reference if e["event"] == "step")
    saved_s = median(e["seconds"] for e in resumed if e["event"] == "step")
    root = args.directory / "checkpoints"
    raw, stored = stored_bytes(root)
    seen = len(losses(killed))
    rows = {
        "steps": f"{args.steps}; killed after {seen}, resumed from step {start['step']}",
        "torn step": f"{', '.join(map(str, sorted(torn)))} (invisible to recovery)",
        "time per step": f"{plain_s * 1e3:.0f} ms without checkpoints, {saved_s * 1e3:.0f} ms with "
        "one at every step",
        "stall per checkpoint": f"median {median(stalls) * 1e3:.1f} ms, mean "
        f"{mean(stalls) * 1e3:.1f} ms",
        "bytes per checkpoint": f"{raw / 1e6:.1f} MB raw, {stored / 1e6:.1f} MB stored",
        "time to recover": f"{start['recover_s']:.2f} s",
        "timeline": str(args.directory / "timeline.png"),
        "checkpoints": f"{root} (look at them: asymcheck ls {root})",
    }
    print()
    for name, value in rows.items():
        print(f"{name:21} {value}")
    print()


def stored_bytes(root: Path) -> tuple[int, int]:
    """Mean raw and stored bytes of the steps that are kept."""
    steps = sorted(steps_committed(root))
    raw = stored = 0
    for step in steps:
        with asymcheck.open_checkpoint(root, step) as checkpoint:
            raw += sum(leaf.nbytes for leaf in checkpoint.leaves.values())
            packs = (pack for m in checkpoint.chain[0].manifests for pack in m.packs)
            stored += sum(pack.nbytes for pack in packs)
    return raw // len(steps), stored // len(steps)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="any text file (default: Python's own manual)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default 60)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--strategy", default="asymcheck", help="asymcheck, asymcheck-s, ...")
    parser.add_argument("--directory", type=Path, help="where to write (default: a new one)")
    parser.add_argument("--run", choices=("reference", "killed", "resumed"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.directory is None:
        args.directory = Path(tempfile.mkdtemp(prefix="asymcheck-gpt2-"))
    return args


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    if arguments.run is not None:
        train(arguments)
    else:
        sys.exit(main(arguments))
