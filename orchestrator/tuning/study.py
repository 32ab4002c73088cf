"""The study: trials in the project's database, each written at the moment it is acknowledged.

In: a database and a name. Out: ``Study``: asks for the next trial, takes what was measured, knows what was left undone. An
Optuna study, so that its dashboard and its visualisations read it. Knows no Ray.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from orchestrator.errors import ModelNotFound, UserError
from orchestrator.recipe_tuning import MAXIMIZED, Tuning
from orchestrator.storage import STUDIES_DATABASE, Storage
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.population import Heir, Part, next_heir
from orchestrator.tuning.samplers import make_sampler
from orchestrator.tuning.space import Point, Space

_BUSY_TIMEOUT_S, _TRIES = 60.0, 8
_BAD_REGION = ("out_of_memory", "diverged")
"""Failures that the values are to blame for: the sampler is to keep away from them."""
_OBJECTIVES = "objectives"
_FIXED = "fixed_params"
"""Optuna's system attribute of a trial whose values are no longer the sampler's choice."""
POINT, METRICS, LOCATION, ERROR, KIND, STARTED, SECONDS, DEFAULT, EPOCHS = (
    "point", "metrics", "location", "error", "kind", "started", "seconds", "default", "epochs",
)  # fmt: skip
MEMBER, GENERATION, PARENT = "member", "generation", "parent"
"""User attributes of a trial."""


@dataclass(frozen=True)
class Asked:
    """A trial to run: a new one, or one that was under way when an earlier run of the study was ended."""

    number: int
    point: Point
    generation: int = 0
    """Of a population: how many parts of its training came before."""
    parent: int | None = None
    """Of a population: the trial whose weights it goes on from."""


class Study:
    """Raises UserError from its constructor when the database cannot be opened."""

    def __init__(
        self, database: str, name: str, tuning: Tuning, space: Space, objectives: Sequence[str], seed: int,
        *, family: Callable[[Point], str] | None = None,
    ) -> None:  # fmt: skip
        """``family``: a name for what trials share. The sampler chooses one of each family; more of it are for the caller to
        enqueue, and begin when one has ended. None: no families, and a point may be tried twice."""
        self.tuning, self.space, self.objectives, self.seed = tuning, space, tuple(objectives), seed
        self.family = family
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        maximize, minimize = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [maximize if o in MAXIMIZED else minimize for o in objectives]
        self.storage = open_database(database)
        self.inner = optuna.create_study(
            storage=self.storage, study_name=name, directions=directions, load_if_exists=True
        )
        if self.inner.user_attrs.get(_OBJECTIVES) is None:
            self.inner.set_user_attr(_OBJECTIVES, list(objectives))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.inner.set_metric_names(list(objectives))

    @property
    def name(self) -> str:
        return self.inner.study_name

    @property
    def is_single(self) -> bool:
        return len(self.objectives) == 1

    def trials(self) -> list[FrozenTrial]:
        return self.inner.get_trials(deepcopy=False)

    def counted(self) -> int:
        """Trials that were begun, those of earlier studies not among them."""
        return sum(POINT in trial.user_attrs for trial in self.trials())

    def unfinished(self) -> list[Asked]:
        """Trials that an earlier run of the study began and did not end, in order. One that was asked for and did not get its
        values gets those that it would have had."""
        left: list[Asked] = []
        for trial in self.trials():
            if trial.state is not TrialState.RUNNING:
                continue
            if POINT in trial.user_attrs:
                known = trial.user_attrs
                left.append(Asked(trial.number, known[POINT], known.get(GENERATION, 0), known.get(PARENT)))
            else:
                left.append(self._asked_for(trial))
        return left

    def _asked_for(self, trial: FrozenTrial) -> Asked:
        """The rest of ``ask``, for a trial that a kill came upon in the midst of it."""
        self.inner.sampler = make_sampler(self.tuning, self.space, self.seed, trial.number)
        # Some values may be there: the sampler begins once more where it began. A sequence that is kept in the study goes on
        # instead, with one point less.
        if _FIXED not in trial.system_attrs and self.tuning.sampler != "qmc":
            copy = self._in_memory([known for known in self.trials() if known.number < trial.number])
            copy.sampler = self.inner.sampler
            values = self.space.encode(self.space.draw(copy.ask()))
            self.storage.set_trial_system_attr(trial._trial_id, _FIXED, values)
        return self._written(optuna.Trial(self.inner, trial._trial_id))

    def enqueue(self, points: Sequence[Point]) -> None:
        """Points to try before the sampler chooses; those that the study has already are left out."""
        for point in points:
            self.inner.enqueue_trial(self.space.encode(point), skip_if_exists=True)

    def following(self, trials: int, generations: int = 1) -> Asked | None:
        """The next trial of so many, or of a population the next part of so many for each; None: none, or not yet."""
        parts = self.parts()
        if sum(part.generation == 0 for part in parts) < trials:
            return self._ask_for_another(self.family) if self.family else self.ask()
        heir = next_heir(parts, generations, self.space, self.seed)
        return None if heir is None else self._begin(heir)

    def parts(self) -> list[Part]:
        """The trials as parts of a population's training."""
        sign = 1.0 if self.inner.directions[0] is optuna.study.StudyDirection.MAXIMIZE else -1.0
        own = [trial for trial in self.trials() if POINT in trial.user_attrs]
        founders = [trial.number for trial in own if GENERATION not in trial.user_attrs]
        members = {number: member for member, number in enumerate(founders)}
        return [_part(trial, members.get(trial.number, -1), sign) for trial in own]

    def ancestors(self, generations: int) -> set[int]:
        """Trials whose weights others of the population may still go on from: none when all are over."""
        parts = self.parts()
        newest = max((part.generation for part in parts), default=0)
        over = sum(part.is_over for part in parts if part.generation == generations - 1)
        if over == sum(part.generation == 0 for part in parts):
            return set()
        return {part.number for part in parts if part.generation >= newest - 1}

    def _begin(self, heir: Heir) -> Asked:
        """Its values are no sampler's choice."""
        begun = optuna.create_trial(
            state=TrialState.RUNNING, params=self.space.encode(heir.point),
            distributions=self.space.distributions(heir.point),
            user_attrs={POINT: heir.point, STARTED: time.time(), MEMBER: heir.member, GENERATION: heir.generation,
                        PARENT: heir.parent},
        )  # fmt: skip
        trial_id = self.storage.create_new_trial(self.inner._study_id, template_trial=begun)
        return Asked(self.storage.get_trial(trial_id).number, heir.point, heir.generation, heir.parent)

    def ask(self) -> Asked:
        """A new trial, its values chosen and written down."""
        self.inner.sampler = make_sampler(self.tuning, self.space, self.seed, len(self.trials()))
        return self._written(self.inner.ask())

    def _written(self, trial: optuna.Trial) -> Asked:
        point = self.space.draw(trial)
        trial.set_user_attr(STARTED, time.time())
        trial.set_user_attr(POINT, point)
        return Asked(trial.number, point)

    def _ask_for_another(self, family: Callable[[Point], str]) -> Asked | None:
        """What waits; else of a family that no trial has had, the sampler's choice, or after some tries one at random; else
        any that was not tried. None: all were, or what is left has to wait for the first of its family."""
        begun = [(t.user_attrs[POINT], t.state.is_finished()) for t in self.trials() if POINT in t.user_attrs]
        tried, families = {point_key(point) for point, _ in begun}, {family(point) for point, _ in begun}
        in_the_making = families - {family(point) for point, is_over in begun if is_over}
        if (waiting := self._first_waiting()) is not None:
            return None if family(waiting) in in_the_making else self.ask()

        def is_new(point: Point) -> bool:
            return family(point) not in families

        def is_left(point: Point) -> bool:
            return point_key(point) not in tried and family(point) not in in_the_making

        chosen = next(filter(is_new, self._rehearsed()), None) or self._any(is_new) or self._any(is_left)
        if chosen is None:
            return None
        self.enqueue([chosen])
        return self.ask()

    def _first_waiting(self) -> Point | None:
        waiting = [trial for trial in self.trials() if trial.state is TrialState.WAITING]
        return self.space.decode(waiting[0].system_attrs[_FIXED]) if waiting else None

    def _rehearsed(self) -> Iterator[Point]:
        """What the sampler chooses, some times over, in a copy of the study: here each choice would use up a number."""
        copy, count = self._in_memory(self.trials()), len(self.trials())
        for number in range(count, count + _TRIES):
            copy.sampler = make_sampler(self.tuning, self.space, self.seed, number)
            trial = copy.ask()
            yield self.space.draw(trial)
            copy.tell(trial, state=TrialState.FAIL)

    def _in_memory(self, trials: Sequence[FrozenTrial]) -> optuna.Study:
        """In memory, for choices that nobody is to see. Points that wait are not in it."""
        copy = optuna.create_study(directions=self.inner.directions)
        copy.add_trials([trial for trial in trials if trial.state is not TrialState.WAITING])
        return copy

    def _any(self, wanted: Callable[[Point], bool]) -> Point | None:
        points = self.space.grid() if self.space.is_finite else []
        order = np.random.default_rng([self.seed, len(self.trials())]).permutation(len(points))
        return next((points[i] for i in order if wanted(points[i])), None)

    def report(self, number: int, epoch: int, value: float) -> None:
        """An epoch's objective (0-based epoch). Written once: what a resumed trial says again is known."""
        trial = optuna.Trial(self.inner, self._id(number))
        if epoch not in self.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, epoch)

    def note(self, number: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(self._id(number), name, value)

    def tell(self, number: int, measured: Measured) -> None:
        """What came out, as one acknowledgement: the trial is not run again. Does nothing for a trial that has ended."""
        if self.storage.get_trial(self._id(number)).state.is_finished():
            return
        self.note(number, **{
            METRICS: measured.metrics, SECONDS: measured.seconds, EPOCHS: measured.epochs,
            **({LOCATION: measured.location} if measured.location else {}),
            **({ERROR: measured.error, KIND: measured.kind} if measured.state == "failed" else {}),
        })  # fmt: skip
        self._constrain(number, measured)
        # What the sampler keeps of a trial is written by the one that chose it.
        self.inner.sampler = make_sampler(self.tuning, self.space, self.seed, number)
        if measured.state == "failed":
            # Samplers leave failed trials out, and take pruned ones without a value for the worst.
            bad = self.is_single and measured.kind in _BAD_REGION
            self.inner.tell(number, state=TrialState.PRUNED if bad else TrialState.FAIL)
        elif measured.state == "pruned" and self.is_single:
            self.inner.tell(number, state=TrialState.PRUNED)
        else:
            self.inner.tell(number, [measured.metrics[name] for name in self.objectives])

    def _constrain(self, number: int, measured: Measured) -> None:
        trial = optuna.Trial(self.inner, self._id(number))
        known = self.storage.get_trial(self._id(number)).constraints  # a kill may have come between this and the end
        for name, violation in self.violations(measured).items():
            if name not in known:
                trial.set_constraint(name, violation)

    def violations(self, measured: Measured) -> dict[str, float]:
        """Bound -> by how much of it the trial is outside; at most 0 is inside. Without the measurement it is not known."""
        found = {}
        for metric, bound in self.tuning.constraints.items():
            value = measured.metrics.get(metric)
            for word, limit, sign in (("at most", bound.at_most, 1.0), ("at least", bound.at_least, -1.0)):
                if limit is not None:
                    outside = 0.0 if value is None else sign * (value - limit) / (abs(limit) or 1.0)
                    found[f"{metric} {word}"] = outside
        return found

    def learn_from(self, names: Sequence[str]) -> int:
        """Copy the finished trials of earlier studies with the same objectives that lie in this space; once.

        Raises:
            ModelNotFound: there is no such study.
        """
        known = set(self.inner.user_attrs.get("warm_start", ()))
        copied = 0
        for name in (n for n in names if n not in known):
            copied += self._copy(name)
            self.inner.set_user_attr("warm_start", sorted({*self.inner.user_attrs.get("warm_start", ()), name}))
        return copied

    def _copy(self, name: str) -> int:
        try:
            other = optuna.load_study(study_name=name, storage=self.storage)
        except KeyError:
            there = [n for n in optuna.get_all_study_names(self.storage) if n != self.name]
            raise ModelNotFound(f"there is no study {name!r} to learn from",
                                f"there are: {', '.join(there) or 'none'}") from None  # fmt: skip
        if other.user_attrs.get(_OBJECTIVES) != list(self.objectives):
            raise UserError(f"the study {name} has other objectives ({', '.join(other.user_attrs.get(_OBJECTIVES, []))})",
                            "learn from one with the same, or leave tuning.warm_start out")  # fmt: skip
        copied = 0
        for trial in other.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if POINT not in trial.user_attrs or not self.space.contains(trial.user_attrs[POINT]):
                continue
            self.inner.add_trial(optuna.create_trial(
                params=self.space.encode(trial.user_attrs[POINT]), values=trial.values,
                distributions=self.space.distributions(trial.user_attrs[POINT]),
                user_attrs={"from": f"{name} {trial.number}"}, constraints=trial.constraints,
            ))  # fmt: skip
            copied += 1
        return copied

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.inner._study_id, number)


def point_key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _part(trial: FrozenTrial, founder: int, sign: float) -> Part:
    known, values = trial.user_attrs, trial.intermediate_values
    value = None if ERROR in known or not values else sign * values[max(values)]
    generation = known.get(GENERATION, 0)
    return Part(trial.number, known.get(MEMBER, founder), generation, known[POINT], trial.state.is_finished(), value)


def database_url(storage: Storage, tuning: Tuning, registry_url: str | None) -> str:
    """Where the trials are kept.

    Raises:
        UserError: the storage is remote and no database was named.
    """
    if url := tuning.database or registry_url:
        return url
    if not storage.is_local:
        raise UserError(
            f"the storage {storage.url} is remote, and a database file cannot lie there",
            "name a database all nodes reach: tuning.database: postgresql+psycopg://user@host/name",
        )
    path = storage.path(STUDIES_DATABASE)
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def open_database(url: str) -> optuna.storages.RDBStorage:
    """Survives a power cut, and waits for other writers."""
    is_sqlite = url.startswith("sqlite")
    options = {"connect_args": {"timeout": _BUSY_TIMEOUT_S}} if is_sqlite else {"pool_pre_ping": True}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (sa.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
        raise UserError(f"the studies' database cannot be opened ({str(error).splitlines()[0]})",
                        "check tuning.database and that its driver is installed") from None  # fmt: skip
    if is_sqlite:
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    return storage
