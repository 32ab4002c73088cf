"""Candidates of one student: it is trained once, and tried in some forms.

In: points, and candidates as they end. Out: the student's name, and the points to try next. Knows no study.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.candidates import Student, has_student, settings_of
from orchestrator.compression.presets import FORM, others_of
from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import MAXIMIZED
from orchestrator.records import TrialRecord
from orchestrator.tuning.outcome import is_inside
from orchestrator.tuning.space import Point, recipe_with
from orchestrator.tuning.study import point_key


class Families:
    def __init__(
        self, recipe: Recipe, forms: Sequence[str], objective: str, rows: int, is_there: Callable[[str], bool]
    ) -> None:
        """``forms``: that are searched. ``objective``: that forms are ranked by. ``rows``: of the validation split.
        ``is_there``: whether the student of this name was made."""
        self.recipe, self.forms, self.objective, self.rows, self.is_there = recipe, forms, objective, rows, is_there
        self.whole: dict[str, tuple[bool, float]] = {}
        """Form -> whether the whole network in it is outside of the limits, and its objective, less being better."""
        self._students: dict[str, str] = {}
        self._followed = set[str]()

    def name(self, point: Point) -> str:
        """Of the student; of the point itself, if that has none."""
        return self._student(point) or point_key(point)

    def after(self, trial: TrialRecord) -> list[Point]:
        """What to try as soon as there is room, now that this one has ended: once for each student, and nothing for one that is
        hopeless on a few rows."""
        student = self._student(trial.parameters)
        if student:
            is_hopeless = trial.metrics.get("rows", self.rows) < self.rows
            if student in self._followed or is_hopeless or not self.is_there(student):
                return []
            self._followed.add(student)
            return others_of(trial.parameters, self.forms, self.ranking)
        if trial.state == "complete" and FORM in trial.parameters:
            value = trial.metrics[self.objective]
            worth = -value if self.objective in MAXIMIZED else value
            self.whole[trial.parameters[FORM]] = (not is_inside(trial), worth)
        return []

    def _student(self, point: Point) -> str:
        """Empty for the whole network. Many points are asked about before one is tried."""
        key = point_key({**point, FORM: None})
        if key not in self._students:
            recipe = recipe_with(self.recipe, point)
            self._students[key] = Student.name_of(recipe) if has_student(settings_of(recipe)) else ""
        return self._students[key]

    @property
    def ranking(self) -> list[str]:
        return sorted(self.whole, key=lambda form: self.whole[form])
