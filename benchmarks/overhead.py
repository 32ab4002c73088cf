"""What a trial costs that does nothing: this project's search beside plain Ray Tune with OptunaSearch, and the driver's memory.

Called by ``python benchmarks/tune.py --overhead [TRIALS]``; plain Tune runs a tenth of them.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from contest import cores

from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.session import connect
from orchestrator.tuning.measured import GoOn, Measured
from orchestrator.tuning.on_ray import Budget, Room, Watcher, search
from orchestrator.tuning.space import Point, Space
from orchestrator.tuning.study import Asked, Study

RATES = (1e-5, 1e-3)


def nothing(number: int, point: Point, go_on: GoOn) -> Measured:
    return Measured("complete", {"macro_f1": -abs(point["training.learning_rate"] - 1e-4)}, epochs=1)


def ours(trials: int, folder: Path) -> dict[str, Any]:
    recipe = Recipe.model_validate({"name": "o", "task": "text_classification", "data": {"source": "none.csv"}})
    dimension = Dimension.model_validate({"log_uniform": list(RATES)})
    space, driver, sizes = Space(recipe, {"training.learning_rate": dimension}), psutil.Process(), list[int]()
    tuning = Tuning(trials=trials, sampler="random")
    study = Study(f"sqlite:///{folder}/s.db", "s", tuning, space, ["macro_f1"], 17)

    def ended(asked: Asked, measured: Measured) -> None:
        sizes.append(driver.memory_info().rss)

    with connect() as session:
        started = time.monotonic()
        search(study, nothing, Room(1.0, 0.0, cores()), Budget(trials, 1), session, Watcher(ended=ended))
        seconds = (time.monotonic() - started) / trials
    return {"trials": trials, "s_per_trial": seconds, "driver_bytes_after_a_tenth": sizes[trials // 10],
            "driver_bytes": sizes[-1]}  # fmt: skip


def plain(trials: int, folder: Path) -> dict[str, Any]:
    import ray
    from optuna.distributions import FloatDistribution
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trial(config: dict[str, Any]) -> None:
        tune.report({"value": -abs(config["rate"] - 1e-4)})

    ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False)
    started = time.monotonic()
    tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch({"rate": FloatDistribution(*RATES, log=True)}, metric="value", mode="max", seed=17),
            num_samples=trials, max_concurrent_trials=cores(),
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()  # fmt: skip
    seconds = (time.monotonic() - started) / trials
    ray.shutdown()
    return {"trials": trials, "s_per_trial": seconds, "driver_bytes": psutil.Process().memory_info().rss}


def measure_overhead(trials: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = {"orchestrator": ours(trials, Path(folder)), "ray tune": plain(max(10, trials // 10), Path(folder))}
    for name, values in figures.items():
        print(f"{name:14}{values['s_per_trial']:7.3f} s per trial over {values['trials']} trials, driver "
              f"{values['driver_bytes'] / 1e6:.0f} MB")  # fmt: skip
    ratio = figures["ray tune"]["s_per_trial"] / figures["orchestrator"]["s_per_trial"]
    machine = {"cores": cores(), "processor": platform.processor(), "torch": torch.__version__}
    ratios = {"seconds per trial, ray tune / orchestrator": ratio}
    print(json.dumps({"benchmark": "tune overhead", "ratios": ratios, "figures": figures, "machine": machine}))
