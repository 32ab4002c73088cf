"""From goals (replicas, latency budget) and measured latencies to the numbers Ray Serve wants, each with its reason.

In: the recipe's ``serving`` section and, if there is one, the evaluation's latency. Out: a ``Scale``. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.recipe_serving import Serving

_UNMEASURED_SHARE = 0.2
"""Without a measurement: a single input is taken to need this share of the latency budget."""
_MAX_QUEUED = 10_000


@dataclass(frozen=True)
class Latency:
    """Measured on one replica, alone. A batch of n is taken to need ``single_ms + (n - 1) * per_row_ms``."""

    single_ms: float
    """One input alone, as evaluation's ``latency_ms_p50``."""
    per_row_ms: float
    """Each further input of a batch: 1000 / evaluation's ``throughput_per_s``."""


@dataclass(frozen=True)
class Scale:
    """What a model's deployment is given. Times in seconds."""

    max_batch_size: int
    target_ongoing_requests: int
    """A request waits for the running batch and is computed in the next: twice a batch of so many fits the latency budget."""
    max_ongoing_requests: int
    """One batch is computed while the next one gathers."""
    max_queued_requests: int
    """Of one input each; who would wait for more than half of ``request_timeout_s`` is turned away at once."""
    min_replicas: int
    initial_replicas: int
    """One at least, to see that the version answers."""
    max_replicas: int
    metrics_interval_s: float
    """With Serve's default of 10 s it takes thrice as long to scale up."""
    look_back_period_s: float
    """The mean over four reports, so that one burst does not start a replica."""
    upscale_delay_s: float
    """A replica takes seconds to start, so a lasting load is answered soon."""
    downscale_delay_s: float
    """A replica that was needed within that time is kept."""

    def autoscaling(self) -> dict[str, float]:
        """Keyword arguments of Ray Serve's AutoscalingConfig."""
        names = ("min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests", "metrics_interval_s",
                 "look_back_period_s", "upscale_delay_s", "downscale_delay_s")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def plan_scale(goals: Serving, measured: Latency | None = None) -> Scale:
    """The numbers that keep a request within ``goals.latency_budget_ms`` as long as ``max_replicas`` allow it."""
    latency = measured or _assumed(goals)
    fitting = _fitting_batch(goals, latency)
    rate_per_s = 1000.0 / latency.per_row_ms
    at_least = max(1, goals.min_replicas)
    in_time = int(at_least * rate_per_s * goals.request_timeout_s / 2)
    ongoing = 2 * max(fitting, goals.max_batch_size)
    return Scale(
        max_batch_size=goals.max_batch_size,
        target_ongoing_requests=fitting,
        max_ongoing_requests=ongoing,
        max_queued_requests=min(max(in_time, ongoing), _MAX_QUEUED),
        min_replicas=goals.min_replicas,
        initial_replicas=at_least,
        max_replicas=goals.max_replicas,
        metrics_interval_s=0.5,
        look_back_period_s=2.0,
        upscale_delay_s=2.0,
        downscale_delay_s=goals.idle_s,
    )


def _assumed(goals: Serving) -> Latency:
    single_ms = _UNMEASURED_SHARE * goals.latency_budget_ms
    return Latency(single_ms, single_ms / 4)


def _fitting_batch(goals: Serving, latency: Latency) -> int:
    """Largest n with ``2 * (single + (n - 1) * per_row) <= budget``, within 1 and max_batch_size."""
    fitting = 1 + int((goals.latency_budget_ms / 2 - latency.single_ms) / latency.per_row_ms)
    return min(max(1, fitting), goals.max_batch_size)
