"""From goals to Serve's numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe_serving import Serving
from orchestrator.serving.scaling import Latency, plan_scale


def goals(**changes: object) -> Serving:
    return Serving(**({"max_replicas": 4, "max_batch_size": 32, "latency_budget_ms": 50} | changes))


def test_two_batches_fit_the_latency_budget() -> None:
    latency = Latency(single_ms=8.0, per_row_ms=2.0)
    scale = plan_scale(goals(), latency)
    assert scale.target_ongoing_requests == 9

    def spent(n: int) -> float:
        return 2 * (8.0 + (n - 1) * 2.0)

    assert spent(9) <= 50 < spent(10)


def test_a_model_slower_than_its_budget_is_asked_one_request_at_a_time() -> None:
    assert plan_scale(goals(), Latency(200.0, 150.0)).target_ongoing_requests == 1


def test_a_shorter_timeout_lets_fewer_requests_wait() -> None:
    latency = Latency(10.0, 10.0)
    short, long = (plan_scale(goals(request_timeout_s=s), latency).max_queued_requests for s in (2.0, 20.0))
    assert (short, long) == (100, 1000)


def test_serve_gets_the_goals_replicas() -> None:
    autoscaling = plan_scale(goals(min_replicas=2)).autoscaling()
    assert (autoscaling["min_replicas"], autoscaling["max_replicas"]) == (2, 4)


@given(
    single=st.floats(0.01, 10_000), gain=st.floats(0.5, 50), budget=st.floats(0.1, 60_000), batch=st.integers(1, 4096)
)
def test_the_numbers_always_make_sense_to_serve(single: float, gain: float, budget: float, batch: int) -> None:
    scale = plan_scale(goals(latency_budget_ms=budget, max_batch_size=batch), Latency(single, single / gain))
    assert 1 <= scale.target_ongoing_requests <= batch
    assert scale.max_ongoing_requests >= 2 * scale.target_ongoing_requests
    assert scale.max_queued_requests >= scale.max_ongoing_requests or scale.max_queued_requests == 10_000
    assert scale.metrics_interval_s < scale.look_back_period_s
