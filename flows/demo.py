"""A tour from nothing to a quantized model: makes a small checkpoint, runs the flow, lets the result speak, runs again.

    python -m shardmill.flows.demo [--scheme S] [--folder ./demo] [--cache FOLDER]

Everything stays below the folder, Prefect's own files too. A second tour finds every shard finished.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardmill import example
from shardmill.core.scheme import PRESETS, Scheme
from shardmill.core.summary import human_bytes, render, summarize
from shardmill.errors import Refused, ShardmillError
from shardmill.storage.publish import LocalDestination

if TYPE_CHECKING:
    from shardmill.flows.quantize_checkpoint import FlowSummary

MODEL: Final = "SmolLM2-135M-Instruct"
QUESTION: Final = "What is the capital of France?"
NEW_TOKENS: Final = 24
GROUP_SIZE: Final = 64
"""The usual 128 does not divide the 576 features of this model."""
_SETTLE_SECONDS: Final = 2.1
"""Digests of files younger than two seconds are not remembered."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tour; returns the exit code of the command line."""
    chosen = _parse(arguments)
    folder = chosen.folder.absolute()
    _set_up_prefect(folder)
    try:
        _tour(folder, chosen.scheme, (chosen.cache or folder / "cache").absolute())
    except ShardmillError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, Refused) else 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shardmill demo", description="Quantize a small real model from end to end.")
    parser.add_argument(
        "--scheme",
        type=str.upper,
        choices=PRESETS,
        metavar="SCHEME",
        default="FP8_DYNAMIC",
        help="a preset (%(default)s)",
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is kept (./%(default)s)")
    parser.add_argument("--cache", type=Path, help="where the downloaded weights are kept (FOLDER/cache)")
    return parser.parse_args(arguments)


def _set_up_prefect(folder: Path) -> None:
    """Let Prefect start a server of its own that tells nobody; it and others read these when they are imported."""
    os.environ.pop("PREFECT_API_URL", None)
    os.environ |= {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))


def _tour(folder: Path, scheme: str, cache: Path) -> None:
    say(f"1. the checkpoint: {MODEL} in bf16, sharded\n")
    source = example.prepare(folder / MODEL, cache=cache)
    _let_settle(source)
    destination = folder / f"{MODEL}-{scheme}"
    say(f"   {source}\n\n2. the flow `quantize-checkpoint`, scheme {scheme}\n")
    first = _run_flow(source, destination, scheme)
    say(f"\n{render(summarize(LocalDestination(destination).manifest() or {}))}\n\n{_cost(first)}\n   {destination}\n")
    say("\n3. the result answers, loaded by transformers\n")
    say(f"   > {QUESTION}\n   {_answer(destination)}\n\n4. the same flow again\n")
    second = _run_flow(source, destination, scheme)
    say(f"\n{_cost(second)}\n")
    if second.hits != second.shards or second.bytes_read:
        raise ShardmillError("expected the second run to find every shard finished; please report this")


def say(text: str) -> None:
    """Write at once, in step with the logs."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _let_settle(source: Path) -> None:
    youngest = max(path.stat().st_ctime for path in source.iterdir())
    time.sleep(min(_SETTLE_SECONDS, max(0.0, youngest + _SETTLE_SECONDS - time.time())))


def _run_flow(source: Path, destination: Path, scheme: str) -> FlowSummary:
    from shardmill.flows.parameters import QuantizeRequest
    from shardmill.flows.quantize_checkpoint import quantize_checkpoint

    group_size = GROUP_SIZE if is_grouped(PRESETS[scheme]) else None
    request = QuantizeRequest(source=str(source), destination=str(destination), scheme=scheme, group_size=group_size)
    return quantize_checkpoint(request)


def is_grouped(scheme: Scheme) -> bool:
    """Whether the scheme lets its user choose a group size."""
    return scheme.weights.strategy == "group" and not scheme.weights.is_mx


def _cost(summary: FlowSummary) -> str:
    rate = f" ({human_bytes(summary.bytes_read / summary.seconds)}/s)" if summary.seconds and summary.bytes_read else ""
    return (
        f"   {summary.hits} of {summary.shards} shards were finished before, "
        f"{human_bytes(summary.bytes_read)} of tensors read in {summary.seconds:.1f} s{rate}"
    )


def _answer(model_folder: Path) -> str:
    """Greedy answer of the quantized model to one question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(told[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    sys.exit(main())
