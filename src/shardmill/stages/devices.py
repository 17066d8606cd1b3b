"""Which devices compute shards, and how many at a time; none of it changes bytes."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shardmill.errors import Problem, show
from shardmill.kernels.threads import cores


class DevicePool:
    """Devices that are lent to one shard at a time, and only after its cache check."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._free.put(device)

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Wait for a free device and give it back afterwards."""
        device = self._free.get()
        try:
            yield device
        finally:
            self._free.put(device)


_DEVICE_FILES: Final = (
    "nvidia*",
    "dxg",
    "kfd",
    "dri/renderD*",
    "accel/accel*",
    "accel[0-9]*",
    "davinci[0-9]*",
    "hl[0-9]*",
)
"""What the drivers of accelerators put under /dev: NVIDIA (dxg: under Windows), AMD, Intel and others."""


_LEAST_SHARDS: Final = 2
_CORES_PER_SHARD: Final = 4
"""Cores that one shard keeps busy: its bytes are read, hashed and written in order."""


def may_have_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether asking torch for accelerators is worth the seconds of its import: never without a device file."""
    return not sys.platform.startswith("linux") or any(any(devices.glob(pattern)) for pattern in _DEVICE_FILES)


def resolve_devices(device: str, workers: int) -> tuple[str, ...]:
    """Name one entry per shard that may be computed at a time.

    `auto` takes every accelerator that torch sees, else the CPU; `cuda:0,cuda:1` names some; `cpu` takes `workers`,
    whose row blocks all cores share.
    """
    if device == "auto" and not may_have_accelerator():
        named: tuple[str, ...] = ("cpu",)
    elif device == "auto":
        import torch  # takes seconds, and naming a device needs none of it

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if accelerator is not None else 0
        named = (
            tuple(f"{accelerator.type}:{number}" for number in range(count)) if accelerator is not None else ("cpu",)
        )
    else:
        named = tuple(part.strip() for part in device.split(",") if part.strip()) or ("cpu",)
    return ("cpu",) * (workers or max(_LEAST_SHARDS, -(-cores() // _CORES_PER_SHARD))) if named == ("cpu",) else named


def check_devices(device: str) -> list[Problem]:
    """Problems of a device list, as `resolve_devices` takes it, on this machine."""
    names = [part.strip() for part in device.split(",") if part.strip()]
    if all(name in ("auto", "cpu") for name in names):
        return []
    import torch  # takes seconds, and `auto` and `cpu` need none of it

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found is not None else 0
    known = {"cpu"} | ({found.type} | {f"{found.type}:{number}" for number in range(count)} if found else set())
    return [
        Problem(
            kind="device-missing",
            message=f"device {show(name)} is not on this machine; found {', '.join(sorted(known))}",
            way_out="set --device",
        )
        for name in dict.fromkeys(names)
        if name not in known
    ]


def limit_threads(devices: Sequence[str]) -> None:
    """Share the cores among the shards that are computed at a time."""
    import torch  # takes seconds, and runs that only hit never need it

    torch.set_num_threads(max(1, cores() // len(devices)))
