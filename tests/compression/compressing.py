"""Small real compressions for the tests: a tiny backbone, a table of made-up reviews, seconds per candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.pipeline import Pipeline
from orchestrator.progress import Event
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import CompressionRecord
from orchestrator.session import Session

QUICK = "proxy_rows: 16, calibration_rows: 32, finalists: 2, sampler: random, concurrency: 1"


def recipe_text(csv: Path, backbone: Path, storage: Path, compression: str, training: str = "") -> str:
    return (
        f"name: r\ntask: text_classification\nstorage: {storage}\ndata: {{source: {csv}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: 32}}\nevaluation: {{bootstrap_samples: 100}}\n"
        f"training: {{epochs: 6, batch_size: 16, learning_rate: 2.0e-3, precision: fp32, {training}}}\n"
        f"compression: {{{QUICK}, {compression}}}\n"
    )


class Compressing:
    """A pipeline on the tests' Ray, and what it said."""

    def __init__(self, text: str, session: Session | None) -> None:
        self.events: list[Event] = []
        self.pipeline = Pipeline(parse_recipe(text), report=self.events.append)
        if session is not None:
            self.pipeline.__dict__["session"] = session

    def compress(self) -> CompressionRecord:
        record = self.pipeline.walk("compress")
        assert isinstance(record, CompressionRecord)
        return record

    @property
    def said(self) -> list[str]:
        return [event.message for event in self.events if event.message]

    def folder(self, location: str) -> Path:
        return self.pipeline.storage.path(location)

    def answer(self, record: CompressionRecord, texts: list[str]) -> list[Any]:
        """As the endpoint would."""
        from orchestrator.serving.predictor import Predictor

        return [p.probabilities for p in Predictor.from_folder(self.folder(record.model.model_location)).predict(texts)]
