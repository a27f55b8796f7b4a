"""Entry point of `python -m megaseq` and of the `megaseq` command."""

from __future__ import annotations

import sys

from megaseq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
