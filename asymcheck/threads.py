"""Background threads give way to training."""

from __future__ import annotations

import os
import threading

LOW_PRIORITY_NICE = 10


def run_at_low_priority() -> None:
    """Lower the calling thread's scheduling priority where the system does so for one thread.

    Linux does; elsewhere `setpriority` would change the whole process, so nothing happens. A
    process that is nicer already stays so: raising the priority again takes rights.
    """
    if os.uname().sysname == "Linux":
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < LOW_PRIORITY_NICE:
            os.setpriority(os.PRIO_PROCESS, thread, LOW_PRIORITY_NICE)
