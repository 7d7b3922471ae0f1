"""A 124 M-parameter TrainState through Orbax: AsymCheckHandler beside Orbax's own handler.

Every variant runs in processes of its own, in turn, in rounds. One saves three times and waits
(blocking time, time to commit), then at every one of a few training steps without waiting (what
`save` holds up training for in steady state), then restores from a cold page cache. A second one,
started anew as after a crash, restores from a cold page cache, too.

    python benchmarks/orbax.py --rounds 3 --output build/orbax
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

# In the place of this file's directory, where `import orbax` would find this file.
sys.path[0] = str(Path(__file__).parents[1] / "examples")
sys.path.insert(1, str(Path(__file__).parent / "common"))

VARIANTS = (
    "orbax",
    "orbax-raw",
    "asymcheck-naive",
    "asymcheck",
    "asymcheck-plane",
    "asymcheck-delta",
)
PARTS = ("saves", "restore")


def make_handler(variant: str) -> tuple[Any, Any, Any]:
    """A handler with the arguments to save and to restore."""
    import orbax.checkpoint as ocp

    import asymcheck
    import asymcheck_jax

    if variant == "orbax":
        return ocp.StandardCheckpointHandler(), ocp.args.StandardSave, ocp.args.StandardRestore
    if variant == "orbax-raw":
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        return handler, ocp.args.PyTreeSave, _pytree_restore
    strategy: Any = variant
    if variant in ("asymcheck-plane", "asymcheck-delta"):  # fewer bytes, whatever that takes
        codec = variant.removeprefix("asymcheck-")
        strategy = asymcheck.AsymCheck(policy=asymcheck.Always(codec))
    handler = asymcheck_jax.AsymCheckHandler(strategy=strategy)
    return handler, asymcheck_jax.AsymCheckSave, asymcheck_jax.AsymCheckRestore


def _pytree_restore(target: Any) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )


def run_saves(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx
    from gpt2_flax import GPT2, SMALL, TINY, loss_of
    from machine import MemoryPeak

    config = TINY if args.small else SMALL
    optimizer = optax.adamw(3e-4)
    graph, params = nnx.split(GPT2(config, nnx.Rngs(0)))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    @jax.jit
    def update(state: Any, tokens: jax.Array) -> Any:
        grads = jax.grad(lambda p: loss_of(graph, p, tokens))(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}

    def step(state: Any, number: int) -> Any:
        shape = (args.batch, args.length + 1)
        tokens = jax.random.randint(jax.random.key(number), shape, 0, config.vocabulary)
        return jax.block_until_ready(update(state, tokens))

    result: dict[str, Any] = {"block_s": [], "commit_s": [], "step_s": [], "steady_block_s": []}
    state = step(state, 0)
    if args.variant == "none":
        for number in range(args.steps):
            begun_s = time.perf_counter()
            state = step(state, number)
            result["step_s"].append(time.perf_counter() - begun_s)
        return result
    handler, save_args, restore_args = make_handler(args.variant)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    manager = ocp.CheckpointManager(args.directory, item_handlers=handler, options=options)
    memory = MemoryPeak(interval_s=0.02)
    for number in range(3):
        state = step(state, number)
        begun_s = time.perf_counter()
        manager.save(number, args=save_args(state))
        result["block_s"].append(time.perf_counter() - begun_s)
        manager.wait_until_finished()
        result["commit_s"].append(time.perf_counter() - begun_s)
    for number in range(3, 3 + args.steps):
        begun_s = time.perf_counter()
        state = step(state, number)
        saved_s = time.perf_counter()
        manager.save(number, args=save_args(state))
        now_s = time.perf_counter()
        result["steady_block_s"].append(now_s - saved_s)
        result["step_s"].append(now_s - begun_s)
    manager.wait_until_finished()
    result["save_extra_nbytes"] = memory.stop()
    older, newest = (
        _files(args.directory / str(step)) for step in sorted(manager.all_steps())[-2:]
    )
    result["written_nbytes"] = sum(newest[inode] for inode in newest.keys() - older.keys())
    result["kept_nbytes"] = sum((older | newest).values())
    found, result["restore_again_s"], _ = timed_restore(manager, restore_args, state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, state)
    assert all(jax.tree.leaves(same)), "what was restored is not what was saved"
    manager.close()
    return result


def _files(step: Path) -> dict[int, int]:
    """The files below a directory, a linked one once: bytes by inode."""
    found = [file.stat() for file in step.rglob("*") if file.is_file()]
    return {status.st_ino: status.st_size for status in found}


def run_restore(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx
    from gpt2_flax import GPT2, SMALL, TINY

    def make_state() -> Any:
        params = nnx.state(GPT2(TINY if args.small else SMALL, nnx.Rngs(0)))
        return {
            "params": params,
            "opt_state": optax.adamw(3e-4).init(params),
            "step": jnp.int32(0),
        }

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(make_state),
    )
    handler, _, restore_args = make_handler(args.variant)
    with ocp.CheckpointManager(args.directory, item_handlers=handler) as manager:
        _, restore_s, extra_nbytes = timed_restore(manager, restore_args, target)
    return {"restore_s": restore_s, "restore_extra_nbytes": extra_nbytes}


def timed_restore(manager: Any, restore_args: Any, like: Any) -> tuple[Any, float, int]:
    """The newest step, the seconds that takes with a cold page cache, and the memory."""
    import jax
    from machine import MemoryPeak, drop_caches

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    drop_caches()
    memory = MemoryPeak(interval_s=0.02)
    begun_s = time.perf_counter()
    found = manager.restore(manager.latest_step(), args=restore_args(target))
    jax.block_until_ready(found)
    return found, time.perf_counter() - begun_s, memory.stop()


# -- the parent --------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for round_number in range(args.rounds):
        for variant in ("none", *args.variants):
            result: dict[str, Any] = {"variant": variant, "round": round_number}
            with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
                for part in PARTS if variant != "none" else ("saves",):
                    result |= _in_a_process(args, variant, part, directory)
            results.append(result)
            print(f"round {round_number + 1} {variant}", file=sys.stderr, flush=True)
    return results


def _in_a_process(
    args: argparse.Namespace, variant: str, part: str, directory: str
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--variant", variant, "--part", part]
    command += ["--directory", directory]
    for name in ("steps", "batch", "length"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--small"] if args.small else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | save blocks, ms: first / next / at every step | commit, s: first / next "
        "| step ratio | GB: a save writes / two steps take | restore, s: new process / same one "
        "| extra memory, GB: save / restore |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = {r["round"]: median(r["step_s"]) for r in results if r["variant"] == "none"}
    for variant in args.variants:
        runs = [r for r in results if r["variant"] == variant]
        first_ms, next_ms, steady_ms = (
            1e3 * median(pick(r) for r in runs)
            for pick in (
                lambda r: r["block_s"][0],
                lambda r: median(r["block_s"][1:]),
                lambda r: median(r["steady_block_s"]),
            )
        )
        first_s = median(r["commit_s"][0] for r in runs)
        next_s = median(median(r["commit_s"][1:]) for r in runs)
        ratio = median(median(r["step_s"]) / plain[r["round"]] for r in runs)
        written, kept, save, restore = (
            median(r[name] for r in runs) / 1e9
            for name in (
                "written_nbytes",
                "kept_nbytes",
                "save_extra_nbytes",
                "restore_extra_nbytes",
            )
        )
        restore_s, again_s = (
            median(r[name] for r in runs) for name in ("restore_s", "restore_again_s")
        )
        lines.append(
            f"| {variant} | {first_ms:.0f} / {next_ms:.0f} / {steady_ms:.0f} | {first_s:.2f} / "
            f"{next_s:.2f} | {ratio:.2f} | {written:.2f} / {kept:.2f} | {restore_s:.2f} / "
            f"{again_s:.2f} | {save:.2f} / {restore:.2f} |"
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
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--small", action="store_true", help="2 M parameters, for a quick look")
    parser.add_argument("--scratch", type=Path, help="where checkpoints go (default: temporary)")
    parser.add_argument("--output", type=Path, default=Path("build/orbax"))
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.variant:
        print(json.dumps((run_saves if arguments.part == "saves" else run_restore)(arguments)))
    else:
        main(arguments)
