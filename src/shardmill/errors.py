"""Every error shardmill raises on purpose, and the value form of a finding.

    ShardmillError
    ├── Refused (ValueError)              the input or the request is refused: exit code 2
    │   ├── RecipeInvalid                 recipe, scheme or pattern
    │   ├── CheckpointInvalid             index, header, config or file of the source
    │   ├── DestinationInvalid            the destination cannot take this result
    │   ├── ExecutorInvalid               the chosen executor cannot work as it is asked to
    │   ├── DeploymentInvalid             what a Prefect server is to have, or to run, cannot be had there
    │   └── NonFiniteWeight               NaN or Inf in a tensor that is to be quantized
    ├── SourceChanged                     the source changed between plan and read
    ├── DeviceExhausted                   an accelerator has no room for even the smallest row block
    ├── WorkerLost                        the process that worked on a shard died, again and again
    ├── StorageFailed (OSError)           a storage operation failed; names operation and place
    │   ├── ObjectMissing (FileNotFoundError)   there is no such file
    │   ├── FileTooLarge                  a file that is read whole is above its limit
    │   └── StorageUnavailable            it may succeed a little later: connection, server error, timeout
    │       └── TransferDamaged           bytes do not have the digest that is known of them
    ├── ServerFailed                      a Prefect server does not answer, or not as it should
    ├── BlobsGone                         the store lost finished shards before they were published
    ├── ShardFailures                     some shards failed; the others are in the store
    ├── BatchFailures                     some checkpoints of a batch failed; the others are converted
    ├── Interrupted                       stopped on request; finished shards stay in the store
    └── VerificationFailed                `verify` found differences

A `Problem` tells subject, expected, found and way out. Planning collects problems instead of raising at the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NON_FINITE = "non-finite"
"""Kind of every problem and warning about NaN and Inf."""
MESSAGE_LIMIT = 300
NAME_LIMIT = 120
_SHOWN = 20


def show(name: str, limit: int = NAME_LIMIT) -> str:
    r"""Quote a foreign name for a message: control characters escaped, backticks replaced, cut at `limit` characters.

    >>> show("model.norm.weight")
    '`model.norm.weight`'
    >>> show("a\tb")
    '`a\\tb`'
    """
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name.replace("`", "'"))
    return f"`{safe if len(safe) <= limit else safe[: limit - 1] + '…'}`"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Problem:
    """One finding about a checkpoint or a request; sorts by file, tensor, kind."""

    file: str = ""
    tensor: str = ""
    kind: str
    """Stable word for machines, such as `group-indivisible`."""
    message: str
    """What was expected and what was found; lower case, no subject."""
    way_out: str = ""

    def __str__(self) -> str:
        """Return one line of at most 300 characters that names file and tensor first."""
        subject = " ".join(
            [show(self.file) for _ in [0] if self.file] + [f"tensor {show(self.tensor)}" for _ in [0] if self.tensor]
        )
        text = f"{subject}: {self.message}" if subject else self.message
        if self.way_out:
            text += f"; {self.way_out}"
        return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


class ShardmillError(Exception):
    """Base of every error raised on purpose."""


class Refused(ShardmillError, ValueError):
    """The input or the request is refused; carries every problem that was found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(set(problems)))
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RecipeInvalid(Refused):
    """The recipe, a scheme or a pattern is refused."""


class CheckpointInvalid(Refused):
    """A file of the source checkpoint is refused."""


class DestinationInvalid(Refused):
    """The destination cannot take this result."""


class ExecutorInvalid(Refused):
    """The chosen executor cannot work as it is asked to."""


class DeploymentInvalid(Refused):
    """What a Prefect server is to have, or to run, cannot be had there."""


class NonFiniteWeight(Refused):
    """A tensor that is to be quantized holds NaN or Inf."""


class SourceChanged(ShardmillError):
    """A source file is not the one that was planned."""


class StorageFailed(ShardmillError, OSError):
    """A storage operation failed; the message names operation and place."""

    def __str__(self) -> str:
        return self.strerror or OSError.__str__(self)


class ObjectMissing(StorageFailed, FileNotFoundError):
    """There is no such file."""


class FileTooLarge(StorageFailed):
    """A file that has to be read whole is larger than its limit."""


class StorageUnavailable(StorageFailed):
    """The storage does not answer, or with an error that passes; another try may succeed a little later."""


class TransferDamaged(StorageUnavailable):
    """Bytes that were read do not have the digest that is known of them."""


class DeviceExhausted(ShardmillError):
    """An accelerator has no room for even the smallest row block."""


class WorkerLost(ShardmillError):
    """The process that worked on a shard died, again and again; other shards are not affected."""


class ServerFailed(ShardmillError):
    """A Prefect server does not answer, does not let us in, or fails."""


class BlobsGone(ShardmillError):
    """The store lost finished shards before they were published; they can be done again."""


class Interrupted(ShardmillError):
    """The run was stopped on request; finished shards stay in the store."""


class VerificationFailed(ShardmillError):
    """`verify` found differences; carries them as problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ShardFailures(ShardmillError):
    """Some shards failed after every other one was finished."""

    def __init__(self, failures: Sequence[tuple[str, BaseException]], done: int) -> None:
        self.failures = tuple(failures)
        self.done = done
        super().__init__(self.failures, done)

    @property
    def is_refusal(self) -> bool:
        """Whether every failure is the input's fault (exit code 2)."""
        return all(isinstance(error, Refused) for _, error in self.failures)

    def __str__(self) -> str:
        total = len(self.failures) + self.done
        lines = [f"{len(self.failures)} of {total} shards failed; {self.done} are finished and kept in the store"]
        lines += [str(e) if isinstance(e, Refused) else f"{show(shard)}: {e}" for shard, e in self.failures]
        return "\n".join(lines)


class BatchFailures(ShardmillError):
    """Some checkpoints of a batch were not converted; all others are."""

    def __init__(self, failures: Sequence[tuple[str, str]], done: int) -> None:
        self.failures = tuple(failures)
        """`(source, message)`."""
        self.done = done
        super().__init__(self.failures, done)

    def __str__(self) -> str:
        total, shown = len(self.failures) + self.done, self.failures[:_SHOWN]
        lines = [f"{len(self.failures)} of {total} checkpoints were not converted"]
        lines += [f"{show(source)}: {message}" for source, message in shown]
        return "\n".join(lines + ["…"] * (len(shown) < len(self.failures)))


def refuse(kind: str, message: str, *, file: str = "", tensor: str = "", way_out: str = "") -> CheckpointInvalid:
    """Build a `CheckpointInvalid` that holds one problem."""
    return CheckpointInvalid([Problem(file=file, tensor=tensor, kind=kind, message=message, way_out=way_out)])
