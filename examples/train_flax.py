"""Train a small Flax GPT-2 on 8 simulated devices, kill it in the middle of a save, resume.

The runs, each in a process of its own: *reference*, never interrupted; *killed*, with a
checkpoint at every step and SIGKILL while one is being written; *resumed*, the same command
again, whose losses and final parameters must equal the reference's bit for bit; *smaller*, which
goes on from there on 4 devices. The exit code is 0 only if all that holds.
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
from statistics import median
from typing import Any

LENGTH = 64


def train(args: argparse.Namespace) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx
    from gpt2_flax import GPT2, TINY, loss_of, shardings
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import asymcheck_jax

    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "model"))
    optimizer = optax.adamw(3e-4)
    graph = nnx.split(nnx.eval_shape(lambda: GPT2(TINY, nnx.Rngs(0))))[0]

    def init() -> dict[str, Any]:
        params = nnx.state(GPT2(TINY, nnx.Rngs(0)))
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    def update(state: dict[str, Any], tokens: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: loss_of(graph, p, tokens))(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss

    text = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)

    def batch(step: int) -> jax.Array:
        starts = np.random.default_rng(step).integers(len(text) - LENGTH - 1, size=(args.batch, 1))
        tokens = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
        return jax.device_put(tokens, NamedSharding(mesh, P("data")))

    shapes = jax.eval_shape(init)
    placement = shardings(shapes, mesh)
    run_update = jax.jit(update, donate_argnums=0, out_shardings=(placement, None))
    if args.run == "reference":
        manager, start = None, 0
    else:
        manager = ocp.CheckpointManager(
            args.directory / "checkpoints",
            item_handlers=asymcheck_jax.AsymCheckHandler(),
            options=ocp.CheckpointManagerOptions(max_to_keep=5),
        )
        start = manager.latest_step() or 0
    begun_s = time.perf_counter()
    if manager is None or start == 0:
        state = jax.jit(init, out_shardings=placement)()
    else:
        target = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement
        )
        state = manager.restore(start, args=asymcheck_jax.AsymCheckRestore(target))
    say(event="start", step=start, recover_s=time.perf_counter() - begun_s)
    for step in range(start + 1, args.steps + 1):
        begun_s = time.perf_counter()
        state, loss = run_update(state, batch(step))
        loss.block_until_ready()
        step_s, begun_s = time.perf_counter() - begun_s, time.perf_counter()
        if manager is not None:
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state))
        save_s = time.perf_counter() - begun_s
        say(event="step", step=step, loss=float(loss).hex(), seconds=step_s, save_s=save_s)
    if manager is not None:
        manager.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sha = hashlib.sha256()
    for path, leaf in leaves:
        sha.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    say(event="end", digest=sha.hexdigest())


def say(**event: object) -> None:
    """Tell the parent process."""
    print(json.dumps(event), flush=True)


# -- the parent: runs, kills, compares ---------------------------------------------------------


def run(args: argparse.Namespace, name: str, **options: Any) -> list[dict[str, Any]]:
    """Run one training process to its end (or its death); the events it told."""
    kill_after = options.pop("kill_after", None)
    chosen = {"steps": args.steps, "batch": args.batch, "devices": 8} | options
    command = [sys.executable, __file__, "--run", name, "--directory", str(args.directory)]
    for option, value in chosen.items():
        command += [f"--{option}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    events: list[dict[str, Any]] = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "step":
            step, loss = events[-1]["step"], float.fromhex(events[-1]["loss"])
            print(f"{name:9} step {step:3}/{chosen['steps']}  loss {loss:.4f}", file=sys.stderr)
            if kill_after is not None and step >= kill_after:
                kill_in_save(process, args.directory / "checkpoints")
                break
    code = process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        sys.exit(f"the {name} run ended with exit code {code}")
    return events


def kill_in_save(process: subprocess.Popen[str], root: Path) -> None:
    """SIGKILL as soon as packs of a step lie in a directory that Orbax has not yet named."""
    while process.poll() is None:
        if any(root.glob("*.orbax-checkpoint-tmp/*/data/*/*.pack")):
            process.send_signal(signal.SIGKILL)
            return
        time.sleep(0.0005)
    sys.exit("the run ended before it could be killed in the middle of a save")


def losses(events: list[dict[str, Any]]) -> dict[int, str]:
    return {e["step"]: e["loss"] for e in events if e["event"] == "step"}


def main(args: argparse.Namespace) -> int:
    reference = run(args, "reference")
    run(args, "killed", kill_after=args.steps // 2)
    resumed = run(args, "resumed")
    smaller = run(args, "smaller", devices=4, steps=args.steps + 5)
    expected = losses(reference)
    same_losses = all(expected[step] == loss for step, loss in losses(resumed).items())
    same_end = resumed[-1]["digest"] == reference[-1]["digest"]
    went_on = smaller[0]["step"] == args.steps and len(losses(smaller)) == 5
    saves_ms = [1e3 * e["save_s"] for e in resumed if e["event"] == "step"]
    print(f"resumed from step {resumed[0]['step']} in {resumed[0]['recover_s']:.2f} s")
    print(f"save() took {median(saves_ms):.1f} ms in the median")
    print(f"losses after recovery bit-identical:  {'yes' if same_losses else 'NO'}")
    print(f"final state bit-identical:            {'yes' if same_end else 'NO'}")
    print(f"went on from step {smaller[0]['step']} on 4 devices:   {'yes' if went_on else 'NO'}")
    return 0 if same_losses and same_end and went_on else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--directory", type=Path, help="where to write (default: a new one)")
    parser.add_argument("--devices", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.directory is None:
        args.directory = Path(tempfile.mkdtemp(prefix="asymcheck-flax-"))
    return args


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    if arguments.run is not None:
        train(arguments)
    else:
        sys.exit(main(arguments))
