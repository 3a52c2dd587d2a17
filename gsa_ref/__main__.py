"""`python -m gsa_ref tour`."""

import argparse
import sys
from collections.abc import Sequence

from gsa_ref import tour


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2, through SystemExit, for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m gsa_ref", description="Gated Sparse Attention, the reference.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "tour",
        help="one sentence through the whole layer, step by step",
        description="One sentence through the whole layer, step by step, with the numbers of the equations. Untrained.",
    )
    tour.add_arguments(command)
    return tour.run(parser.parse_args(argv), command)


if __name__ == "__main__":
    sys.exit(main())
