"""Arithmetic by IEEE 754 whatever a thread was told: subnormals kept, rounding to nearest.

`torch.set_flush_denormal`, or a library that was compiled with -ffast-math, have the processor
flush subnormals to zero, in their thread and in those started from it. Formulas that are replayed
elsewhere must not depend on that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager

_LIBM = ctypes.CDLL(None)  # the running program: the C library's functions
_DEFAULT = ctypes.c_void_p(-1)  # FE_DFL_ENV of glibc and musl
_ENVIRONMENT_NBYTES = 512  # more than any fenv_t


@contextmanager
def ieee_arithmetic() -> Generator[None]:
    """This thread computes by IEEE 754 inside, and as before afterwards."""
    before = ctypes.create_string_buffer(_ENVIRONMENT_NBYTES)
    _LIBM.fegetenv(before)
    _LIBM.fesetenv(_DEFAULT)
    try:
        yield
    finally:
        _LIBM.fesetenv(before)
