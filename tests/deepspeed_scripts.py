"""Scripts that call save_checkpoint and load_checkpoint; started by `deepspeed_runs.start`."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed_runs import Setting, build, snapshot, train

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
        engine.save_checkpoint(tags, tag="again", client_state={"epoch": 9})
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
