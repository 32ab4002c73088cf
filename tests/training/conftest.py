"""The run that the tests on Ray compare theirs with, and what several tests need."""

from pathlib import Path

import pytest
from running import prepared_job, train

from orchestrator.session import Session
from orchestrator.training.worker import TrainJob


@pytest.fixture(scope="session")
def ray_job(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return prepared_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(ray_job: TrainJob, ray_session: Session) -> str:
    """The weights of the run that nobody touched."""
    return train(ray_job, ray_session)[0]


@pytest.fixture
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events tell of each step, not of some."""
    monkeypatch.setattr("orchestrator.training.worker._REPORT_EVERY_S", 0.0)
