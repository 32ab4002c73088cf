"""Small real studies for the tests: a tiny backbone, a table of made-up reviews, seconds per trial."""

from __future__ import annotations

from pathlib import Path

from orchestrator.pipeline import Pipeline
from orchestrator.progress import Event
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import DatasetRecord, StudyRecord, TrialRecord
from orchestrator.session import Session
from orchestrator.storage import STUDIES_DATABASE
from orchestrator.tuning.outcome import records_of
from orchestrator.tuning.study import Study

SPACE = "training.learning_rate: {log_uniform: [5.0e-4, 5.0e-3]}, training.batch_size: [8, 16]"


def recipe_text(csv: Path, backbone: Path, storage: Path, tuning: str, training: str = "", space: str = SPACE) -> str:
    return (
        f"name: r\ntask: text_classification\nstorage: {storage}\ndata: {{source: {csv}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: 32}}\n"
        f"training: {{epochs: 3, batch_size: 16, learning_rate: 1.0e-3, precision: fp32, {training}}}\n"
        f"tuning: {{space: {{{space}}}, {tuning}}}\n"
    )


class Studying:
    """A pipeline on the tests' Ray, and what it said."""

    def __init__(self, text: str, session: Session | None) -> None:
        self.events: list[Event] = []
        self.pipeline = Pipeline(parse_recipe(text), report=self.events.append)
        if session is not None:
            self.pipeline.__dict__["session"] = session

    def tune(self) -> StudyRecord:
        record = self.pipeline.walk("tune")
        assert isinstance(record, StudyRecord)
        return record

    def dataset(self) -> DatasetRecord:
        return self.pipeline.prepare()

    @property
    def said(self) -> list[str]:
        return [event.message for event in self.events if event.message]

    def folder(self, location: str) -> Path:
        return self.pipeline.storage.path(location)

    def trials(self) -> list[TrialRecord]:
        """As another process reads them out of the database."""
        stage = self.pipeline.tune_stage()
        name = stage.location(self.dataset()).rpartition("/")[2]
        database = f"sqlite:///{self.folder(STUDIES_DATABASE)}"
        return records_of(Study(database, name, stage.tuning, stage.space, stage.objectives, stage.recipe.seed))
