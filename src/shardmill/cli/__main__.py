"""`python -m shardmill.cli` is `shardmill`."""

import sys

from shardmill.cli import program

if __name__ == "__main__":
    sys.exit(program())
