"""The store against a dict: whatever happens to it, it gives the right bytes or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shardmill.core.receipt import Receipt
from shardmill.errors import StorageFailed
from shardmill.storage.folder import Folder
from shardmill.storage.operations import Faults, watched
from shardmill.storage.seal import KEY_VARIABLE
from shardmill.storage.store import FULL, Store, blob_name
from storage.places import LocalPlace, MemoryPlace, Place

KEYS: Final = [f"{number:064x}" for number in range(5)]
SOUND: Final = "sound"
DAMAGED: Final = "damaged"
UNKNOWN: Final = "unknown"
"""Somebody was killed while putting it: it is there, whole, or it is not."""


def data_of(key: str) -> bytes:
    """The bytes that a job gives, always the same."""
    return key.encode() * (50 + int(key, 16))


def put(store: Store, key: str) -> None:
    """Write blob and receipt as a run does."""
    data = data_of(key)
    with store.writer("shape", len(data)) as writer:
        for begin in range(0, len(data), 1000):
            writer.write(memoryview(data)[begin : begin + 1000])
        blob = writer.commit(blob_name(key), sealed=True)
    store.put_receipt(Receipt(key=key, blob=blob, tensors=("a",), weights=(), producer=()), shape="s")


def truncate(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def zero_the_tail(data: bytes) -> bytes:
    return data[: len(data) // 2].ljust(len(data), b"\0")


def empty(_data: bytes) -> bytes:
    return b""


class StoreMachine(RuleBasedStateMachine):
    """Runs, strangers and accidents at one store; each look-up is that of another process."""

    place: Place

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, str] = {}

    def make_place(self) -> Place:
        """An empty place; each storage has a machine of its own, and this one is never run."""
        raise NotImplementedError

    @initialize()
    def open(self) -> None:
        self.place = self.make_place()
        self.folder: Folder = self.place.open()
        self.opened().prepare()

    def opened(self, verify: str = "fast") -> Store:
        return Store(self.place.open(), verify=verify)

    # ---- what runs do

    @rule(key=st.sampled_from(KEYS))
    def put(self, key: str) -> None:
        put(self.opened(), key)
        self.model[key] = SOUND

    @rule(key=st.sampled_from(KEYS), verify=st.sampled_from(["fast", FULL]))
    def get(self, key: str, verify: str) -> None:
        store = self.opened(verify)
        receipt = store.lookup(key)
        state = self.model.get(key)
        if receipt is not None:
            assert state in (SOUND, UNKNOWN), f"{key[-1]} is {state} and was found"
            assert self.place.contents()[blob_name(receipt.blob_stem)] == data_of(key)
            self.model[key] = SOUND
            assert store.failed_checks == frozenset()
        else:
            assert state != SOUND, f"{key[-1]} is sound and was not found"
            assert state == UNKNOWN or bool(store.failed_checks) == (state == DAMAGED)
            if f"receipts/{key}.json" not in self.place.contents():
                self.model.pop(key, None)  # a bad blob was set aside, and its receipt removed
            elif state == UNKNOWN:
                assert store.failed_checks
                self.model[key] = DAMAGED  # a receipt that was damaged before somebody was killed

    @rule(key=st.sampled_from(KEYS), writers=st.integers(2, 4))
    def put_at_once(self, key: str, writers: int) -> None:
        barrier = threading.Barrier(writers)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                barrier.wait(30)
                put(self.opened(), key)
            except BaseException as error:  # noqa: BLE001  whatever it is: the main thread tells it
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        self.model[key] = SOUND

    # ---- what goes wrong

    @rule(key=st.sampled_from(KEYS), at=st.integers(1, 14), is_lasting=st.booleans())
    def fail_in_a_put(self, key: str, at: int, is_lasting: bool) -> None:  # noqa: FBT001  hypothesis passes by name
        faults = Faults("EIO", at, is_lasting=is_lasting)
        before = self.model.get(key)
        try:
            with watched(faults):
                put(self.opened(), key)
        except StorageFailed:
            self._interrupted(key, before)
        else:
            self.model[key] = SOUND

    def _interrupted(self, key: str, before: str | None) -> None:
        """A put that ended half-way replaced a blob, a receipt, both or nothing; equal bytes harm no receipt."""
        if before != SOUND:
            self.model[key] = UNKNOWN if before != DAMAGED else self._look(key)

    def _look(self, key: str) -> str:
        """What lies under a key that was damaged before a put that ended half-way."""
        files = self.place.contents()
        blob, receipt = files.get(blob_name(key)), files.get(f"receipts/{key}.json")
        if receipt is None:
            return UNKNOWN
        return UNKNOWN if blob == data_of(key) else DAMAGED

    @precondition(lambda self: DAMAGED not in self.model.values())
    @rule(key=st.sampled_from(KEYS), at=st.integers(1, 14))
    def die_in_a_put(self, key: str, at: int) -> None:
        if not isinstance(self.place, LocalPlace):
            return  # memory dies with its process
        child = os.fork()
        if not child:
            try:
                with watched(Faults("kill", at)):
                    put(self.opened(), key)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            self.model[key] = SOUND
        elif self.model.get(key) != SOUND:
            self.model[key] = UNKNOWN

    @precondition(lambda self: SOUND in self.model.values())
    @rule(chance=st.randoms(use_true_random=False), damage=st.sampled_from([truncate, flip, zero_the_tail, empty]))
    def damage_a_blob(self, chance: Any, damage: Callable[[bytes], bytes]) -> None:
        self._damage(chance, blob_name, damage)

    @precondition(lambda self: SOUND in self.model.values())
    @rule(chance=st.randoms(use_true_random=False), damage=st.sampled_from([truncate, empty]))
    def damage_a_receipt(self, chance: Any, damage: Callable[[bytes], bytes]) -> None:
        self._damage(chance, lambda key: f"receipts/{key}.json", damage)

    def _sound(self) -> list[str]:
        return sorted(key for key, state in self.model.items() if state == SOUND)

    def _damage(self, chance: Any, name_of: Callable[[str], str], damage: Callable[[bytes], bytes]) -> None:
        key = chance.choice(self._sound())
        self.place.plant(name_of(key), damage(self.place.contents()[name_of(key)]))
        self.model[key] = DAMAGED

    @precondition(lambda self: list(self.model.values()).count(SOUND) >= 2)
    @rule(chance=st.randoms(use_true_random=False))
    def swap_receipts(self, chance: Any) -> None:
        one, other = chance.sample(self._sound(), 2)
        files = self.place.contents()
        self.place.plant(f"receipts/{one}.json", files[f"receipts/{other}.json"])
        self.place.plant(f"receipts/{other}.json", files[f"receipts/{one}.json"])
        self.model |= {one: DAMAGED, other: DAMAGED}

    @precondition(lambda self: SOUND in self.model.values())
    @rule(chance=st.randoms(use_true_random=False), part=st.sampled_from(["blobs", "receipts"]))
    def lose_a_file(self, chance: Any, part: str) -> None:
        key = chance.choice(self._sound())
        self.folder.remove(blob_name(key) if part == "blobs" else f"receipts/{key}.json")
        if part == "blobs":
            self.model[key] = DAMAGED
        else:
            self.model.pop(key)

    # ---- who looks after it

    @rule(kept=st.sets(st.sampled_from(KEYS)))
    def evict(self, kept: set[str]) -> None:
        self.opened().collect(older_than=-1, keep=kept)
        for key in set(self.model) - kept:
            if self.model[key] == DAMAGED and f"receipts/{key}.json" in self.place.contents():
                continue  # a receipt without its blob is no entry; it is found when it is asked for
            self.model.pop(key)

    @rule()
    def sweep(self) -> None:
        self.opened().prepare()
        names = {name.rpartition("/")[2] for name in self.place.contents() if name.startswith(("blobs/", "receipts/"))}
        assert names <= {f"{key}.safetensors" for key in KEYS} | {f"{key}.json" for key in KEYS}

    @rule()
    def verify(self) -> None:
        found = {problem.file for problem in self.opened().verify()}
        damaged = {key for key, state in self.model.items() if state == DAMAGED}
        unknown = {key for key, state in self.model.items() if state == UNKNOWN}
        assert damaged - unknown == found - unknown

    @invariant()
    def every_sound_blob_is_there(self) -> None:
        if self._sound():
            files = self.place.contents()
            for key in self._sound():
                assert files[blob_name(key)] == data_of(key)


class LocalMachine(StoreMachine):
    def make_place(self) -> Place:
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        return LocalPlace(self.root)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


class MemoryMachine(StoreMachine):
    def make_place(self) -> Place:
        return MemoryPlace()

    def teardown(self) -> None:
        if hasattr(self, "place"):
            assert isinstance(self.place, MemoryPlace)
            self.place.clear()


def run_machine(machine: type[StoreMachine], examples: int, steps: int) -> None:
    patient = [HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=patient)
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("machine", [LocalMachine, MemoryMachine])
def test_the_store_gives_the_right_bytes_or_nothing(machine: type[StoreMachine]) -> None:
    run_machine(machine, 5, 40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("key", ["", secrets.token_hex(16)], ids=["open", "sealed"])
@pytest.mark.parametrize("machine", [LocalMachine, MemoryMachine])
def test_10000_steps(machine: type[StoreMachine], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if key:
        monkeypatch.setenv(KEY_VARIABLE, key)
    run_machine(machine, 50, 50)
