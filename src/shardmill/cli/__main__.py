"""`python -m shardmill.cli` is `shardmill`."""

import sys

from shardmill.cli import main

if __name__ == "__main__":
    sys.exit(main())
