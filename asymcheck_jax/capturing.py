"""Between `save` and the moment when the host has every byte: copies from devices, and windows."""

from __future__ import annotations

from asymcheck.partition import even_windows
from asymcheck.snapshot import Capture
from asymcheck.state import StateView
from asymcheck_jax.donation import note_capture
from asymcheck_jax.sources import DeviceShard

WINDOWS = even_windows(8, 0)


def read_devices(capture: Capture, view: StateView, *, donation_is_held: bool) -> bool:
    """Ask for all copies to the host, and wait for them unless donation is held; whether there
    are any."""
    shards = [source for source in view.sources if isinstance(source, DeviceShard)]
    for shard in shards:
        shard.start()
    if not donation_is_held:
        for shard in shards:
            shard.fetch()
    elif shards:
        note_capture(capture)
    return bool(shards)


def spread(capture: Capture, pace_s: float) -> None:
    """Open the windows one after the other, over `pace_s` or until everything is captured."""
    for ordinal in range(len(WINDOWS)):
        capture.enter_window(ordinal)
        if capture.await_captured(pace_s / len(WINDOWS)):
            return
