"""Run llm-compressor's `model_free_ptq`; started by tests with the interpreter of the reference environment.

run_reference.py SOURCE SCHEME DESTINATION [SCHEME DESTINATION ...]
"""

from __future__ import annotations

import sys


def main() -> None:
    """Convert one source by several schemes; imports take longer than the work."""
    from llmcompressor import model_free_ptq  # type: ignore[import-not-found]  # it has an environment of its own

    source, *pairs = sys.argv[1:]
    for scheme, destination in zip(pairs[::2], pairs[1::2], strict=True):
        ignore = ["lm_head", "re:.*embed_tokens"]
        model_free_ptq(source, destination, scheme=scheme, ignore=ignore, max_workers=1, device="cpu")


if __name__ == "__main__":
    main()
