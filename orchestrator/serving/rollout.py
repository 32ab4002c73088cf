"""What becomes of a version that is rolled out beside the stable one: who asks it, what is known of both, what follows.

In: a ``Policy``, and what was counted of each version (``Arm``). Out: a ``Verdict``, and a report. Pure.

Whoever looks again and again sees at last what chance does rarely. The bounds here hold at all looks together, so a
verdict may be asked for after each request (Ville 1939; Robbins 1970, 'Statistical methods related to the law of the
iterated logarithm'; Howard et al. 2021, 'Time-uniform, nonparametric, nonasymptotic confidence sequences'). They take it
that an arm's requests are independent, each failing with the same probability.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Literal

from orchestrator.recipe_serving import Rollout

Mode = Literal["canary", "shadow", "ab"]
BOUNDS_MS = tuple(0.1 * 2 ** (step / 4) for step in range(102))
"""Where the latency histogram's buckets end, from 0.1 ms to more than an hour, each 19 % above the one before."""
_QUESTIONS = 4
"""Errors, slowness, agreement, feedback: each may err with this part of ``1 - confidence``."""
_HALVINGS = 60


@dataclass(frozen=True)
class Policy:
    """What a rollout is for, and what it may cost. Shares and rates are in 0..1."""

    mode: Mode
    """canary: answers some; shadow: is asked as well, answers nobody; ab: answers some, and users' feedback decides."""
    share: float
    """Of the requests that go to the candidate; in shadow: that are also shown to it."""
    latency_budget_ms: float
    """A request that takes longer is slow."""
    terms: Rollout


@dataclass
class Arm:
    """What was counted of one version. The stable one's ``compared`` and ``disagreed`` stay 0."""

    requests: int = 0
    errors: int = 0
    """Requests that the version failed to answer."""
    slow: int = 0
    """Requests that took longer than the budget."""
    compared: int = 0
    """Inputs that the stable version answered as well."""
    disagreed: int = 0
    """Of those compared: labels that differ."""
    told: int = 0
    """Answers that feedback came for."""
    right: int = 0
    """Of those: that the feedback agreed with."""
    latencies: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))
    """Requests per bucket of ``BOUNDS_MS``; the last bucket has no end."""

    def record(self, ms: float, error: bool, budget_ms: float) -> None:
        self.requests += 1
        self.errors += error
        self.slow += ms > budget_ms
        self.latencies[bisect_left(BOUNDS_MS, ms)] += 1

    def compare(self, agreed: bool) -> None:
        self.compared += 1
        self.disagreed += not agreed

    def tell(self, right: bool) -> None:
        self.told += 1
        self.right += right

    def quantile_ms(self, q: float) -> float | None:
        """The end of the bucket that the quantile is in: at most 19 % too long. None without requests."""
        if self.requests == 0:
            return None
        rank = max(1, math.ceil(q * self.requests))
        bucket = bisect_left(list(accumulate(self.latencies)), rank)
        return BOUNDS_MS[min(bucket, len(BOUNDS_MS) - 1)]

    def merged(self, other: Arm) -> Arm:
        """Both arms' counts in one, as if one gateway had seen all."""
        counts = [each.name for each in fields(self) if each.name != "latencies"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Arm(**sums, latencies=[a + b for a, b in zip(self.latencies, other.latencies, strict=True)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> Arm:
        """What ``to_json`` made. Raises ValueError if its histogram has other buckets."""
        arm = cls(**counts | {"latencies": list(counts["latencies"])})
        if len(arm.latencies) != len(BOUNDS_MS) + 1:
            raise ValueError(f"a histogram of {len(arm.latencies)} buckets, not {len(BOUNDS_MS) + 1}")
        return arm


@dataclass(frozen=True)
class Verdict:
    kind: Literal["wait", "rollback", "promote"]
    reason: str
    """A sentence for people, with the figures."""
    evidence: dict[str, float]
    """The same figures by name: bounds, and what of the policy they were held against."""


@dataclass(frozen=True)
class Rate:
    """How often something happened, and between which bounds its probability is."""

    hits: int
    trials: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, trials: int, alpha: float) -> Rate:
        return cls(hits, trials, *rate_bounds(hits, trials, alpha))

    def __str__(self) -> str:
        return f"{self.hits} of {self.trials}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rate": self.hits / self.trials if self.trials else None}


@dataclass(frozen=True)
class _Known:
    """Of one version. What is compared with the other version's gets half of the question's alpha."""

    errors: Rate
    slow: Rate
    right: Rate
    agreed: Rate

    @classmethod
    def of(cls, arm: Arm, policy: Policy) -> _Known:
        alpha = (1.0 - policy.terms.confidence) / _QUESTIONS
        return cls(
            errors=Rate.of(arm.errors, arm.requests, alpha / 2),
            slow=Rate.of(arm.slow, arm.requests, alpha / 2),
            right=Rate.of(arm.right, arm.told, alpha / 2),
            agreed=Rate.of(arm.compared - arm.disagreed, arm.compared, alpha),
        )


def sticky(identity: bytes | str, salt: str) -> float:
    """Uniform in [0, 1): the same for the same identity and salt on any machine, independent between salts."""
    told = identity if isinstance(identity, bytes) else identity.encode("utf-8", "surrogatepass")
    named = salt.encode("utf-8", "surrogatepass")
    digest = blake2b(len(named).to_bytes(8, "big") + named + told, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def goes_to_candidate(policy: Policy, identity: bytes | str, salt: str) -> bool:
    """Whoever is with the candidate stays there when its share grows."""
    return sticky(identity, salt) < policy.share


def rate_bounds(successes: int, trials: int, alpha: float) -> tuple[float, float]:
    """Bounds of a probability, which ever leave it out, at any number of trials, with probability ``alpha`` at most.

    Left out is each p whose likelihood is ``alpha`` times the mean likelihood over all p, or less; the mean is weighted by
    Beta(1/2, 1/2). The mean over the true p's likelihood is a martingale: it ever reaches 1 / alpha with probability alpha
    at most.
    """
    return _low(successes, trials, alpha), 1.0 - _low(trials - successes, trials, alpha)


def _low(successes: int, trials: int, alpha: float) -> float:
    """The end of the interval below successes / trials, by bisection: the likelihood rises up to there."""
    if successes == 0:
        return 0.0
    failures = trials - successes
    mean = math.lgamma(successes + 0.5) + math.lgamma(failures + 0.5) - math.lgamma(trials + 1.0) - math.log(math.pi)
    least = mean + math.log(alpha)
    outside, inside = 0.0, successes / trials
    for _ in range(_HALVINGS):
        middle = (outside + inside) / 2
        if successes * math.log(middle) + failures * math.log1p(-middle) > least:
            inside = middle
        else:
            outside = middle
    return outside


def judge(policy: Policy, stable: Arm, candidate: Arm) -> Verdict:
    """What follows from all that was counted so far."""
    return _judge(policy, _Known.of(stable, policy), _Known.of(candidate, policy))


def report(policy: Policy, stable: Arm, candidate: Arm) -> dict[str, Any]:
    """All that is known of both, for JSON; the bounds are those that the verdict rests on."""
    old, new = _Known.of(stable, policy), _Known.of(candidate, policy)
    return {
        "mode": policy.mode,
        "share": policy.share,
        "stable": _told(stable, old),
        "candidate": _told(candidate, new),
        "agreement": new.agreed.to_json(),
        "verdict": asdict(_judge(policy, old, new)),
    }


def _told(arm: Arm, known: _Known) -> dict[str, Any]:
    return {
        "requests": arm.requests,
        "errors": known.errors.to_json(),
        "slow": known.slow.to_json(),
        "accuracy": known.right.to_json(),
        "p50_ms": arm.quantile_ms(0.5),
        "p99_ms": arm.quantile_ms(0.99),
    }


def _judge(policy: Policy, old: _Known, new: _Known) -> Verdict:
    harm = _harm(policy, old, new)
    if policy.mode == "shadow":
        return _of_shadow(harm, new)
    if harm is not None:
        return harm
    return _by_feedback(old.right, new.right) if policy.mode == "ab" else _by_requests(policy, new.errors.trials)


def _harm(policy: Policy, old: _Known, new: _Known) -> Verdict | None:
    """What speaks against the candidate, the gravest first."""
    late = f" in more than {policy.latency_budget_ms:g} ms"
    return (
        _rise("error_rate", "failed", "", old.errors, new.errors, policy.terms.max_error_rate_rise)
        or _rise("slow", "answered", late, old.slow, new.slow, policy.terms.max_slow_rise)
        or _disagreement(policy, new.agreed)
    )


def _rise(name: str, did: str, how: str, old: Rate, new: Rate, tolerated: float) -> Verdict | None:
    """Rollback if the rate rose by more than is tolerated. A stable version that nobody has asked counts as flawless."""
    ceiling = old.high if old.trials else 0.0
    if new.low <= ceiling + tolerated:
        return None
    compared = f"{old}: at least {new.low:.2%} against at most {ceiling:.2%}"
    alone = f"had none yet: at least {new.low:.2%}"
    reason = (
        f"the candidate {did} {new} requests{how}, the stable version {compared if old.trials else alone}, and "
        f"{100 * tolerated:g} percentage points more are tolerated"
    )
    evidence = {f"candidate_{name}_low": new.low, f"stable_{name}_high": ceiling, f"max_{name}_rise": tolerated}
    return Verdict("rollback", reason, evidence)


def _disagreement(policy: Policy, agreed: Rate) -> Verdict | None:
    if policy.terms.min_agreement is None or agreed.high >= policy.terms.min_agreement:
        return None
    reason = (
        f"the candidate agreed with the stable version on {agreed} inputs: on {agreed.high:.2%} at most, and "
        f"{policy.terms.min_agreement:.2%} are asked for"
    )
    return Verdict("rollback", reason, {"agreement_high": agreed.high, "min_agreement": policy.terms.min_agreement})


def _of_shadow(harm: Verdict | None, new: _Known) -> Verdict:
    if harm is not None:
        reason = f"a shadow answers nobody; if it did, it would be rolled back: {harm.reason}"
        return Verdict("wait", reason, harm.evidence)
    reason = f"nothing speaks against the candidate after {new.errors.trials} requests that were shown to it"
    return Verdict("wait", reason, {"candidate_requests": new.errors.trials})


def _by_feedback(old: Rate, new: Rate) -> Verdict:
    told = f"feedback agreed with the candidate on {new} answers, with the stable version on {old}"
    evidence = {"candidate_right_low": new.low, "candidate_right_high": new.high,
                "stable_right_low": old.low, "stable_right_high": old.high}  # fmt: skip
    if new.low > old.high:
        return Verdict("promote", f"{told}: at least {new.low:.2%} against at most {old.high:.2%}", evidence)
    if new.high < old.low:
        return Verdict("rollback", f"{told}: at most {new.high:.2%} against at least {old.low:.2%}", evidence)
    return Verdict("wait", f"{told}: which of them is better is not known yet", evidence)


def _by_requests(policy: Policy, requests: int) -> Verdict:
    told = f"nothing speaks against the candidate after {requests} requests"
    if policy.terms.promote_after is None:
        return Verdict("wait", f"{told}; a person promotes it", {"candidate_requests": requests})
    evidence: dict[str, float] = {"candidate_requests": requests, "promote_after": policy.terms.promote_after}
    if requests >= policy.terms.promote_after:
        return Verdict("promote", f"{told}, and {policy.terms.promote_after} were asked for", evidence)
    return Verdict("wait", f"{told}; it is promoted after {policy.terms.promote_after} unless something does", evidence)
