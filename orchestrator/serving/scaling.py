"""From goals (replicas, latency budget) and measured latencies to the numbers Ray Serve wants, each with its reason.

In: the recipe's ``serving`` section and, if there is one, the evaluation's latency. Out: a ``Scale``. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.recipe import Serving

_UNMEASURED_SHARE = 0.2
"""Without a measurement: a single input is taken to need this share of the latency budget."""
_MIN_BATCH_GAIN = 1.2
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
    """What a model's deployment is given. Times in seconds; ``reasons`` says why, field by field."""

    max_batch_size: int
    batch_wait_timeout_s: float
    target_ongoing_requests: int
    max_ongoing_requests: int
    max_queued_requests: int
    min_replicas: int
    max_replicas: int
    metrics_interval_s: float
    look_back_period_s: float
    upscale_delay_s: float
    downscale_delay_s: float
    reasons: dict[str, str]

    def autoscaling(self) -> dict[str, float]:
        """Keyword arguments of Ray Serve's AutoscalingConfig."""
        names = ("min_replicas", "max_replicas", "target_ongoing_requests", "metrics_interval_s", "look_back_period_s",
                 "upscale_delay_s", "downscale_delay_s")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def plan_scale(goals: Serving, measured: Latency | None = None) -> Scale:
    """The numbers that keep a request within ``goals.latency_budget_ms`` as long as ``max_replicas`` allow it."""
    latency = measured or _assumed(goals)
    wait_ms = _wait_ms(goals, latency)
    fitting = _fitting_batch(goals, latency, wait_ms)
    rate_per_s = 1000.0 / latency.per_row_ms
    in_time = int(goals.min_replicas * rate_per_s * goals.request_timeout_s / 2)
    ongoing = 2 * max(fitting, goals.max_batch_size)
    return Scale(
        max_batch_size=goals.max_batch_size,
        batch_wait_timeout_s=wait_ms / 1000.0,
        target_ongoing_requests=fitting,
        max_ongoing_requests=ongoing,
        max_queued_requests=min(max(in_time, ongoing), _MAX_QUEUED),
        min_replicas=goals.min_replicas,
        max_replicas=goals.max_replicas,
        metrics_interval_s=0.5,
        look_back_period_s=2.0,
        upscale_delay_s=2.0,
        downscale_delay_s=60.0,
        reasons={
            "batch_wait_timeout_s": (
                f"batching is {latency.single_ms / latency.per_row_ms:.1f} times as fast; what arrives while a batch "
                f"is computed forms the next one in any case, so an idle replica waits {wait_ms:.1f} ms at most"
            ),
            "target_ongoing_requests": (
                f"a request waits for the running batch and is computed in the next: twice a batch of {fitting} "
                f"({latency.single_ms:.1f} ms + {latency.per_row_ms:.1f} ms per further input) is the largest within "
                f"{goals.latency_budget_ms:g} ms"
            ),
            "max_ongoing_requests": "one batch is computed while the next one gathers",
            "max_queued_requests": (
                f"{goals.min_replicas} replicas answer {goals.min_replicas * rate_per_s:.0f} inputs/s; who would wait "
                f"for more than half of request_timeout_s is turned away at once"
            ),
            "metrics_interval_s": "twice a second; with Serve's default of 10 s it takes thrice as long to scale up",
            "look_back_period_s": "the mean over four reports, so that one burst does not start a replica",
            "upscale_delay_s": "a replica takes seconds to start, so a lasting load is answered soon",
            "downscale_delay_s": "a replica that was needed within the last minute is kept",
        },
    )  # fmt: skip


def _assumed(goals: Serving) -> Latency:
    single_ms = _UNMEASURED_SHARE * goals.latency_budget_ms
    return Latency(single_ms, single_ms / 4)


def _wait_ms(goals: Serving, latency: Latency) -> float:
    """A tenth of what the budget leaves after one input alone, never more than a quarter of that input's own time."""
    if latency.single_ms / latency.per_row_ms < _MIN_BATCH_GAIN or goals.max_batch_size == 1:
        return 0.0
    slack_ms = max(0.0, goals.latency_budget_ms - latency.single_ms)
    return min(0.1 * slack_ms, 0.25 * latency.single_ms)


def _fitting_batch(goals: Serving, latency: Latency, wait_ms: float) -> int:
    """Largest n with ``wait + 2 * (single + (n - 1) * per_row) <= budget``, within 1 and max_batch_size."""
    per_batch_ms = (goals.latency_budget_ms - wait_ms) / 2
    fitting = 1 + int((per_batch_ms - latency.single_ms) / latency.per_row_ms)
    return min(max(1, fitting), goals.max_batch_size)
