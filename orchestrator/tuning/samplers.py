"""Which values to try next: Optuna's samplers, made anew for each trial, so that all they know lies in the database.

A study that was killed therefore goes on as it would have: the random numbers of a trial follow from the study's seed and
the trial's number, everything else from the trials before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from orchestrator.errors import UserError
from orchestrator.recipe_tuning import Tuning
from orchestrator.tuning.space import Space

_GENERATION = 20
"""Trials per generation of nsga2: studies here have tens to hundreds of trials, not thousands."""


def make_sampler(tuning: Tuning, space: Space, seed: int, number: int) -> BaseSampler:
    """The sampler that chooses the values of trial ``number``.

    Raises:
        UserError: it needs a package that is not installed.
    """
    mine = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _MAKERS[tuning.sampler](tuning, space, seed, mine)


def _tpe(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    return optuna.samplers.TPESampler(
        n_startup_trials=tuning.startup_trials, seed=mine, multivariate=True, group=space.is_conditional,
        constant_liar=True,
    )  # fmt: skip


def _gp(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    _need("scipy", "gp")
    return optuna.samplers.GPSampler(
        n_startup_trials=tuning.startup_trials, seed=mine, independent_sampler=_random(tuning, space, seed, mine),
        warn_independent_sampling=False,
    )  # fmt: skip


def _cmaes(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    _need("cmaes", "cmaes")
    return optuna.samplers.CmaEsSampler(
        seed=mine, independent_sampler=_random(tuning, space, seed, mine), warn_independent_sampling=False
    )


def _nsga2(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=_GENERATION, seed=mine)


def _random(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=mine)


def _qmc(tuning: Tuning, space: Space, seed: int, mine: int) -> BaseSampler:
    """One scrambled sequence for the whole study: its seed is the study's."""
    _need("scipy", "qmc")
    return optuna.samplers.QMCSampler(
        scramble=True, seed=seed, independent_sampler=_random(tuning, space, seed, mine),
        warn_independent_sampling=False,
    )  # fmt: skip


_MAKERS: dict[str, Callable[[Tuning, Space, int, int], BaseSampler]] = {
    "tpe": _tpe, "gp": _gp, "cmaes": _cmaes, "nsga2": _nsga2, "random": _random, "qmc": _qmc,
    "grid": _random,  # its points are all set beforehand
}  # fmt: skip


def _need(package: str, sampler: str) -> Any:
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise UserError(f"the sampler {sampler} needs the package {package}",
                        "pip install 'ray-orchestrator[tune]', or choose another sampler") from None  # fmt: skip
