"""Doors for ``ray job submit -- python -m jobs.<verb> RECIPE``: the command line's verbs, one module each."""

import sys


def enter(verb: str) -> None:
    """Run a verb of the command line with this process's arguments."""
    from orchestrator.cli import main

    main([verb, *sys.argv[1:]])
