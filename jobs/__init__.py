"""Doors for ``ray job submit -- python -m jobs.<verb> RECIPE``: the command line's verbs, one module each."""

import contextlib
import sys


def enter(verb: str) -> None:
    """Run a verb of the command line with this process's arguments."""
    from orchestrator.cli import main

    _write_demo_data(sys.argv[1:])
    main([verb, *sys.argv[1:]])


def _write_demo_data(arguments: list[str]) -> None:
    """The demos' recipes read what `make demo` writes; a job of a fresh clone writes it itself, where the job runs."""
    from jobs.demo import RECIPES, write_digits, write_reviews

    writers = {"text": write_reviews, "images": write_digits}
    for kind, recipe in RECIPES.items():
        if recipe in arguments:
            with contextlib.suppress(
                ModuleNotFoundError
            ):  # without the demo's packages the recipe's check says what is missing
                writers[kind]()
