"""Large pieces of memory, made and filled without holding up the other threads of the process.

A `bytearray` is filled with zeros, and a slice of a view is assigned, while the interpreter's lock is held: some
milliseconds for 16 MiB, in which the thread of the event loop can neither send nor receive. numpy does both without.
"""

from __future__ import annotations

_SMALL_BYTES = 64 << 10
"""What is shorter is copied sooner than numpy has looked at it."""


def new_buffer(nbytes: int) -> memoryview:
    """Memory that holds anything.

    >>> len(new_buffer(5))
    5
    """
    import numpy as np  # takes a while, and plans and hits need none of it

    return np.empty(nbytes, np.uint8).data


def copy_bytes(target: memoryview, data: memoryview) -> None:
    """Fill `target` with bytes of the same length.

    >>> target = new_buffer(3)
    >>> copy_bytes(target, memoryview(b"abc"))
    >>> bytes(target)
    b'abc'
    """
    if len(target) < _SMALL_BYTES:
        target[:] = data
        return
    import numpy as np  # as above

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))
