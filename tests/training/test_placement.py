"""How many workers a run gets, and how many runs go on at once."""

import pytest

from orchestrator.errors import ResourceError
from orchestrator.recipe import Training
from orchestrator.session import Resources
from orchestrator.training.placement import place_runs, place_workers


@pytest.mark.parametrize("workers", [3, 64])
def test_more_workers_than_the_cluster_has_are_refused_at_once(workers: int) -> None:
    with pytest.raises(ResourceError, match=rf"workers is {workers}, but the cluster has 2 CPUs \(1 node, 2 CPUs"):
        place_workers(Training(workers=workers), Resources(1, 2.0, 0.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("training", "resources", "runs", "expected"),
    [
        (Training(), Resources(1, 2.0, 0.0, 2.0, 2.0), 3, (1, 1.0, 2)),
        (Training(workers=2), Resources(1, 2.0, 0.0, 2.0, 2.0), 3, (2, 1.0, 1)),
        (Training(workers=2), Resources(1, 16.0, 0.0, 16.0, 16.0), 3, (2, 2.0, 3)),
        (Training(), Resources(1, 16.0, 4.0, 16.0, 16.0), 8, (1, 4.0, 4)),
        (Training(), Resources(4, 32.0, 0.0, 8.0, 30.0), 5, (4, 1.0, 5)),
        (Training(), Resources(1, 4.0, 0.0, 4.0, 0.0), 5, (1, 1.0, 1)),
    ],
)
def test_no_more_runs_go_on_than_there_is_room_for(
    training: Training, resources: Resources, runs: int, expected: tuple[int, float, int]
) -> None:
    placement, at_once = place_runs(training, resources, runs)
    assert (placement.workers, placement.cpus_per_worker, at_once) == expected
    assert at_once == 1 or placement.workers * placement.cpus_per_worker * at_once <= resources.free_cpus
