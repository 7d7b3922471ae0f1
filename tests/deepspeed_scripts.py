"""Scripts that call save_checkpoint and load_checkpoint; started by `deepspeed_runs.start`."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import checkpoint_engine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed_runs import Setting, build, engine_of, snapshot, train
from sharded_net import loss_of, random_tokens

from asymcheck.commit import committed_steps
from asymcheck.errors import StoreFullError
from asymcheck.stores import LocalStore
from asymcheck_torch.deepspeed import use


def save(rank: int, world: int, folder: str, setting: Setting) -> Any:
    """Saves under three tags, the last two of one step; states at saves and at the end, losses."""
    engine, tags = build(setting), f"{folder}/tags"
    torch.manual_seed(100 + rank)
    states: list[Any] = []
    with use(engine, url=f"{folder}/run"):
        train(engine, 2)
        assert engine.save_checkpoint(tags, client_state={"epoch": 2, "note": "first"})
        states.append(snapshot(engine))
        train(engine, 1)
        engine.save_checkpoint(tags)
        states.append(snapshot(engine))
        engine.save_checkpoint(tags, tag="again", client_state={"epoch": 9, "rank": rank})
        if setting.stage < 3:
            engine.save_16bit_model(f"{folder}/weights", "model.bin")
        losses = train(engine, 2)
        states.append(snapshot(engine))
    return states, losses


def load(rank: int, world: int, folder: str, setting: Setting, loads: list[dict[str, Any]]) -> Any:
    """Loads one after the other, trains on after each, and saves in the end."""
    engine, tags = build(setting), f"{folder}/tags"
    torch.manual_seed(200 + rank)
    train(engine, 1)
    said: list[Any] = []
    with use(engine, url=f"{folder}/run"):
        for how in loads:
            path, client = engine.load_checkpoint(tags, **how)
            at_start = snapshot(engine)
            losses = train(engine, 2)
            said.append((path, client, at_start, snapshot(engine), losses))
        engine.save_checkpoint(tags, tag="after")
    return said


def load_nothing(rank: int, world: int, folder: str, setting: Setting) -> list[str]:
    """What loading says where there is nothing that it could load."""
    engine = build(setting)
    said: list[str] = []
    with use(engine, url=f"{folder}/run"):
        said.append(str(engine.load_checkpoint(f"{folder}/nowhere")))
        for options in ({"tag": "none"}, {"tag": "none", "custom_load_fn": print}):
            try:
                engine.load_checkpoint(f"{folder}/nowhere", **options)
            except Exception as error:
                said.append(type(error).__name__)
    return said


# -- several runs of one start: `of_all` gives them their rank -----------------------------------


def save_anywhere(rank: int, folder: str, setting: Setting) -> dict[str, Any]:
    """Saves where no update has just been, and loads that later: {tag: (state then, loaded)}."""
    states: dict[str, Any] = {}
    with engine_of(setting) as engine, use(engine, url=f"{folder}/run"):
        torch.manual_seed(100 + rank)

        def save_as(tag: str, **options: Any) -> None:
            engine.save_checkpoint(f"{folder}/tags", tag=tag, **options)
            states[tag] = everything(engine)

        train(engine, 1)
        train(engine, 1, spoil=math.inf)
        assert engine.skipped_steps == 1
        save_as("skipped")
        micro_step(engine)
        assert engine.micro_steps % engine.gradient_accumulation_steps() == 1
        save_as("amid")
        micro_step(engine)
        with torch.no_grad():
            loss_of(engine, random_tokens())
        save_as("forward")
        save_as("frozen", exclude_frozen_parameters=True)
        train(engine, 1)
        return {tag: (state, reload(engine, folder, tag)) for tag, state in states.items()}


def micro_step(engine: Any) -> None:
    """A forward and a backward pass, and an update if it is time for one."""
    engine.backward(loss_of(engine, random_tokens()))
    engine.step()


def everything(engine: Any) -> dict[str, Any]:
    """A snapshot, and this rank's generator."""
    generator = torch.get_rng_state()  # gathering takes nothing from it
    return snapshot(engine) | {"generator": generator}


def reload(engine: Any, folder: str, tag: str) -> dict[str, Any]:
    """What the engine holds when a tag was loaded."""
    engine.load_checkpoint(f"{folder}/tags", tag=tag)
    return everything(engine)


def fail_to_save(rank: int, folder: str, on_error: Any) -> Any:
    """Saves that fail on one rank, then one that does not: what they said, and `latest` after.

    Also how long the first took, and whether what was loaded at last is what was saved.
    """
    said: list[tuple[str, str]] = []
    options: dict[str, Any] = {"on_error": on_error, "commit_timeout_s": 5.0}
    with engine_of(Setting(3)) as engine, use(engine, url=f"{folder}/run", **options):
        torch.manual_seed(100 + rank)

        def save_as(tag: str, **options: Any) -> None:
            try:
                engine.save_checkpoint(f"{folder}/tags", tag=tag, **options)
                error = ""
            except Exception as caught:
                error = type(caught).__name__
            said.append((error, Path(folder, "tags", "latest").read_text()))

        train(engine, 1)
        save_as("good")
        train(engine, 1)
        begun_s = time.monotonic()
        with failing_puts("data/", rank == 1):
            save_as("full")
        took_s = time.monotonic() - begun_s
        with failing_puts("asymcheck.json", rank == 0):
            save_as("unmarked")
        save_as("refused", client_state={"what": object() if rank == 1 else 1})
        save_as("next", client_state={"rank": rank})
        state = everything(engine)
        train(engine, 1)
        _, client = engine.load_checkpoint(f"{folder}/tags")
        return said, took_s, (state, everything(engine)), client


@contextmanager
def failing_puts(part: str, here: bool) -> Iterator[None]:
    """On this rank local stores have no room for objects with `part` in their keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "put_if_absent") if here else ():
            put: Any = getattr(LocalStore, name)

            def refuse(self: Any, key: str, *rest: Any, put: Any = put) -> Any:
                if part in key:
                    raise StoreFullError("there is no room", object=key)
                return put(self, key, *rest)

            patch.setattr(LocalStore, name, refuse)
        yield


def save_a_tag_twice(rank: int, folder: str) -> tuple[int, int]:
    """One tag at two stages: the update that it was saved after, and that which is loaded."""
    for stage in (2, 3):
        with engine_of(Setting(stage)) as engine, use(engine, url=f"{folder}/run"):
            engine.load_checkpoint(f"{folder}/tags")
            train(engine, 2)
            engine.save_checkpoint(f"{folder}/tags", tag="best")
            saved = engine.global_steps
    with engine_of(Setting(3)) as engine, use(engine, url=f"{folder}/run"):
        engine.load_checkpoint(f"{folder}/tags")
        return saved, engine.global_steps


def lose_the_disk(rank: int, folder: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The states at a save, and as loaded from the mirror; the steps of the store made anew."""
    places: Any = {"url": f"{folder}/run", "mirror": f"{folder}/mirror"}
    with engine_of(Setting(3)) as engine:
        with use(engine, **places):
            train(engine, 2)
            engine.save_checkpoint(f"{folder}/tags", tag="best")
            then = snapshot(engine)
            train(engine, 1)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{folder}/run")
        dist.barrier()
        with use(engine, **places):
            engine.load_checkpoint(f"{folder}/tags")
            now = snapshot(engine)
            train(engine, 1)
            engine.save_checkpoint(f"{folder}/tags", tag="next")
            return then, now, committed_steps(LocalStore(f"{folder}/run"))


def load_where_one_rank_sees_nothing(rank: int, folder: str) -> list[str]:
    """What loading says if only rank 0 sees the tags, and if only rank 1 does."""
    said: list[str] = []
    with engine_of(Setting(3)) as engine, use(engine, url=f"{folder}/run"):
        train(engine, 1)
        engine.save_checkpoint(f"{folder}/tags", tag="here")
        for seeing in (0, 1):
            where = f"{folder}/tags" if rank == seeing else f"{folder}/nowhere"
            for tag in (None, "here"):
                try:
                    path, _ = engine.load_checkpoint(where, tag=tag)
                    said.append("nothing" if path is None else Path(path).name)
                except Exception as error:
                    said.append(type(error).__name__)
    return said


def take_tags_for_others(rank: int, folder: str) -> dict[str, str]:
    """What loading says of tags that do not name what was saved, and saving of one that cannot be.

    Also the same where everything is well.
    """
    tags, said = Path(folder, "tags"), dict[str, str]()

    def outcome(work: Callable[[], Any]) -> str:
        try:
            work()
        except Exception as error:
            return type(error).__name__
        return ""

    with engine_of(Setting(3)) as engine:
        with use(engine, url=f"{folder}/other"):
            train(engine, 1)
            engine.save_checkpoint(f"{folder}/others", tag="best")
        with use(engine, url=f"{folder}/run"):
            train(engine, 1)
            engine.save_checkpoint(tags, tag="best")
            said["another run's"] = outcome(lambda: engine.load_checkpoint(f"{folder}/others"))
            said["own"] = outcome(lambda: engine.load_checkpoint(tags))
            if rank == 0:
                Path(tags, "best", "mp_rank_00_model_states.pt").touch()
                Path(tags, "blocked").touch()
            dist.barrier()
            said["natively saved since"] = outcome(lambda: engine.load_checkpoint(tags))
            engine.save_checkpoint(tags, tag="best")
            said["saved again"] = outcome(lambda: engine.load_checkpoint(tags))
            said["blocked"] = outcome(lambda: engine.save_checkpoint(tags, tag="blocked"))
            with no_directories(rank == 1):
                said["made by others"] = outcome(lambda: engine.save_checkpoint(tags, tag="made"))
            said["latest"] = Path(tags, "latest").read_text()
    return said


@contextmanager
def no_directories(here: bool) -> Iterator[None]:
    """On this rank no directory can be made."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("this is read-only")

    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(checkpoint_engine.os, "makedirs", refuse)
        yield


def scale_losses(rank: int, folder: str, setting: Setting) -> Any:
    """The members of a dynamic loss scaler when it was saved, of a fresh one, and when loaded.

    The device may not know fp16 (CPUs are refused): a real scaler of DeepSpeed's takes the place of
    the one that does nothing.
    """
    with engine_of(setting) as engine, use(engine, url=f"{folder}/run"):
        train(engine, 1)
        engine.optimizer.loss_scaler = scaler = dynamic_scaler()
        for overflow in (True, True, False, True):
            scaler.update_scale(overflow)
        engine.save_checkpoint(f"{folder}/tags")
        engine.optimizer.loss_scaler = fresh = dynamic_scaler()
        before = dict(vars(fresh))
        engine.load_checkpoint(f"{folder}/tags")
        return vars(scaler), before, vars(engine.optimizer.loss_scaler)


def dynamic_scaler() -> Any:
    """As fp16 starts with."""
    return DynamicLossScaler(2.0**16, 2, 1.0, 2, False)
