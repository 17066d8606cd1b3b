"""How many threads compute; apart from the kernels, so that asking costs no import of theirs."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
