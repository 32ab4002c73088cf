"""What becomes of a rollout, without an endpoint."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe_serving import Rollout
from orchestrator.serving.rollout import (
    BOUNDS_MS,
    Arm,
    Mode,
    Policy,
    goes_to_candidate,
    judge,
    rate_bounds,
    report,
    sticky,
)

PEEKS = 2000
COUNTS = st.integers(0, 10**6)
ALPHAS = st.floats(1e-6, 0.5)


def policy(mode: Mode = "canary", share: float = 0.1, **terms: Any) -> Policy:
    return Policy(mode, share, 50.0, Rollout(**{"min_agreement": 0.9} | terms))


def arm(requests: int = 0, errors: int = 0, slow: int = 0, **counts: int) -> Arm:
    return Arm(requests, errors, slow, **counts, latencies=[requests] + [0] * len(BOUNDS_MS))


@st.composite
def arms(draw: st.DrawFn) -> Arm:
    made = Arm()
    for ms, error in draw(st.lists(st.tuples(st.floats(0, 10**8), st.booleans()), max_size=10)):
        made.record(ms, error, 50.0)
    for agreed, right in draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=10)):
        made.compare(agreed)
        made.tell(right)
    return made


# Who asks which version


@given(identity=st.binary() | st.text(), salt=st.text(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_who_is_with_the_candidate_stays_there_when_its_share_grows(
    identity: bytes | str, salt: str, shares: tuple[float, float]
) -> None:
    small, large = (goes_to_candidate(policy(share=share), identity, salt) for share in sorted(shares))
    assert large or not small
    assert goes_to_candidate(policy(share=1.0), identity, salt)
    assert not goes_to_candidate(policy(share=0.0), identity, salt)


def test_the_same_identity_is_sent_the_same_way_on_any_machine() -> None:
    assert sticky("ann", "reviews/2") == sticky(b"ann", "reviews/2") == 0.616437191962642
    assert sticky("nn", "reviews/2a") != sticky("ann", "reviews/2")


def test_places_are_uniform_and_those_of_two_rollouts_independent() -> None:
    from scipy.stats import chisquare

    first, second = (np.array([sticky(f"user {i}", salt) for i in range(20_000)]) for salt in ("a", "b"))
    cells = np.histogram2d(first, second, bins=10, range=[[0, 1], [0, 1]])[0]
    assert cells.sum() == 20_000
    assert chisquare(cells.ravel()).pvalue > 0.01


# What is counted


def test_each_event_is_counted_where_it_belongs() -> None:
    seen = Arm()
    for ms, error in ((10.0, False), (50.0, True), (50.1, False)):
        seen.record(ms, error, 50.0)
    for yes in (True, False, False):
        seen.compare(yes)
        seen.tell(not yes)
    counts = seen.to_json()
    assert sum(counts.pop("latencies")) == 3
    assert counts == {
        "requests": 3, "errors": 1, "slow": 1, "compared": 3, "disagreed": 2, "told": 3, "right": 2,
    }  # fmt: skip


@given(arms(), arms(), arms())
def test_merging_is_the_same_in_any_order(a: Arm, b: Arm, c: Arm) -> None:
    assert a.merged(b).merged(c) == a.merged(b.merged(c)) == c.merged(b).merged(a)
    assert a.merged(Arm()) == a
    assert a.merged(b).requests == a.requests + b.requests


@given(arms())
def test_an_arm_survives_json_and_shares_nothing_with_it(made: Arm) -> None:
    told = made.to_json()
    again = Arm.from_json(json.loads(json.dumps(told)))
    assert again == made
    Arm.from_json(told).record(1.0, True, 50.0)
    again.record(1.0, True, 50.0)
    assert told == made.to_json() != again.to_json()


def test_a_histogram_of_other_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="a histogram of 1 buckets"):
        Arm.from_json(Arm().to_json() | {"latencies": [0]})


@given(times=st.lists(st.floats(0.1, 3.6e6), min_size=1, max_size=50), q=st.floats(0, 1))
def test_a_quantile_is_one_bucket_too_long_at_most(times: list[float], q: float) -> None:
    seen = Arm()
    for ms in times:
        seen.record(ms, False, 50.0)
    true = sorted(times)[max(1, math.ceil(q * len(times))) - 1]
    told = seen.quantile_ms(q)
    assert told is not None
    assert true <= told < 1.19 * true


def test_quantiles_outside_of_the_buckets_are_their_ends() -> None:
    assert Arm().quantile_ms(0.5) is None
    seen = Arm()
    seen.record(0.0, False, 50.0)
    seen.record(math.inf, False, 50.0)
    assert (seen.quantile_ms(0.5), seen.quantile_ms(1.0)) == (BOUNDS_MS[0], BOUNDS_MS[-1])


# What is known of a rate


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 0, (0.0, 1.0)), (1, 1, (0.05, 1.0)), (0, 1, (0.0, 0.95)), (2, 2, (math.sqrt(0.0375), 1.0))],
)
def test_few_trials_have_the_bounds_of_the_formula(successes: int, trials: int, expected: tuple[float, float]) -> None:
    """The mean likelihood of n successes out of n is 1/2 * 3/4 * ...: p is left out if p^n is a tenth of it or less."""
    assert rate_bounds(successes, trials, 0.1) == pytest.approx(expected)


@given(successes=COUNTS, failures=COUNTS, alpha=ALPHAS)
def test_bounds_hold_the_estimate_and_mirror_each_other(successes: int, failures: int, alpha: float) -> None:
    trials = successes + failures
    low, high = rate_bounds(successes, trials, alpha)
    assert 0.0 <= low < high <= 1.0
    assert not trials or low <= successes / trials <= high
    assert rate_bounds(failures, trials, alpha) == pytest.approx((1.0 - high, 1.0 - low))


@given(successes=COUNTS, failures=COUNTS.filter(bool), alpha=ALPHAS, times=st.integers(2, 10))
def test_bounds_shrink_with_trials_and_grow_with_confidence(
    successes: int, failures: int, alpha: float, times: int
) -> None:
    trials = successes + failures
    low, high = rate_bounds(successes, trials, alpha)
    more_low, more_high = rate_bounds(times * successes, times * trials, alpha)
    surer_low, surer_high = rate_bounds(successes, trials, alpha / 2)
    assert more_high - more_low < high - low < surer_high - surer_low


@given(successes=COUNTS, failures=COUNTS.filter(bool), alpha=ALPHAS)
def test_bounds_rise_with_each_success(successes: int, failures: int, alpha: float) -> None:
    before, after = (rate_bounds(successes + more, successes + failures, alpha) for more in (0, 1))
    assert before[0] < after[0]
    assert before[1] < after[1]


def kept(p: float, alpha: float) -> np.ndarray:
    """[PEEKS, 2]: after 1, 2, ... trials, the fewest and the most successes whose bounds hold p."""
    fewest, most, ends = 0, 0, []
    for trials in range(1, PEEKS + 1):
        fewest += rate_bounds(fewest, trials, alpha)[1] < p
        most += rate_bounds(most + 1, trials, alpha)[0] <= p
        ends.append((fewest, most))
    return np.array(ends)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_bounds_that_are_looked_at_after_each_trial_hold_the_rate_in_all_but_alpha_of_the_runs(p: float) -> None:
    alpha, trials = 0.1, np.arange(1, PEEKS + 1)
    successes = (np.random.default_rng(0).random((3000, PEEKS)) < p).cumsum(axis=1)
    fewest, most = kept(p, alpha).T
    missed = ((successes < fewest) | (successes > most)).any(axis=1).mean()
    assert missed <= alpha

    # The bounds for one look (here of the normal distribution) are left sooner or later.
    z = (successes - p * trials) / np.sqrt(p * (1 - p) * trials)
    assert (np.abs(z[:, 100:]) > 1.645).any(axis=1).mean() > 3 * alpha


@pytest.mark.parametrize("p", [0.01, 0.5])
def test_the_chance_of_ever_leaving_the_rate_out_is_computed_to_be_below_alpha(p: float) -> None:
    alpha, missed, mass = 0.1, 0.0, np.array([1.0])
    """mass: of each count of successes, the probability to be there and never to have been outside"""
    for fewest, most in kept(p, alpha):
        mass = np.convolve(mass, [1.0 - p, p])
        missed += mass[:fewest].sum() + mass[most + 1 :].sum()
        mass[:fewest] = mass[most + 1 :] = 0.0
    assert missed + mass.sum() == pytest.approx(1.0)
    assert 0.01 < missed <= alpha


# What follows


@pytest.mark.parametrize(
    ("stable", "candidate", "expected"),
    [
        (arm(360, errors=1), arm(40, errors=12), "the candidate failed 12 of 40 requests, the stable version 1 of 360: at"),
        (arm(), arm(10, errors=10), "the candidate failed 10 of 10 requests, the stable version had none yet: at least"),
        (arm(900, slow=9), arm(100, slow=40), "the candidate answered 40 of 100 requests in more than 50 ms, the stable"),
        (arm(900), arm(100, compared=100, disagreed=40), "agreed with the stable version on 60 of 100 inputs"),
        (arm(900, slow=9), arm(100, errors=50, slow=50, compared=100, disagreed=100), "failed 50 of 100"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["canary", "shadow", "ab"])
def test_harm_is_told_and_ends_every_rollout_but_a_shadow(
    stable: Arm, candidate: Arm, expected: str, mode: Mode
) -> None:
    verdict = judge(policy(mode, promote_after=10), stable, candidate)
    assert verdict.kind == ("wait" if mode == "shadow" else "rollback")
    assert expected in verdict.reason
    assert ("it would be rolled back: the candidate" in verdict.reason) == (mode == "shadow")
    assert all(0.0 <= value <= 1.0 for value in verdict.evidence.values())


@pytest.mark.parametrize(
    ("stable", "candidate", "changes"),
    [
        (arm(360, errors=1), arm(40, errors=12), {"max_error_rate_rise": 0.2}),
        (arm(360, errors=1), arm(40, errors=12), {"confidence": 1 - 1e-9}),
        (arm(360, errors=108), arm(40, errors=12), {}),
        (arm(900, slow=9), arm(100, slow=40), {"max_slow_rise": 0.4}),
        (arm(900), arm(100, compared=100, disagreed=40), {"min_agreement": 0.6}),
        (arm(900), arm(100, compared=100, disagreed=40), {"min_agreement": None}),
        (arm(0), arm(1, errors=1), {"max_error_rate_rise": 0.1}),
        (arm(900), arm(0), {}),
    ],
)
def test_what_is_tolerated_or_may_be_chance_ends_nothing(
    stable: Arm, candidate: Arm, changes: dict[str, object]
) -> None:
    verdict = judge(policy(**changes), stable, candidate)
    assert verdict.kind == "wait"
    assert f"after {candidate.requests} requests; a person promotes it" in verdict.reason


def test_the_reason_and_the_evidence_tell_the_same_figures() -> None:
    verdict = judge(policy(), arm(360, errors=1), arm(40, errors=12))
    low, high = rate_bounds(12, 40, 0.05 / 8)[0], rate_bounds(1, 360, 0.05 / 8)[1]
    expected = {"candidate_error_rate_low": low, "stable_error_rate_high": high, "max_error_rate_rise": 0.01}
    assert verdict.evidence == pytest.approx(expected)
    assert verdict.reason.endswith(
        f"at least {low:.2%} against at most {high:.2%}, and 1 percentage points more are tolerated"
    )


def test_a_canary_is_promoted_after_so_many_requests_and_no_other_mode_is() -> None:
    before, after = (judge(policy(promote_after=500), arm(4500), arm(n)) for n in (499, 500))
    assert (before.kind, after.kind) == ("wait", "promote")
    assert "after 499 requests; it is promoted after 500" in before.reason
    assert {judge(policy(mode, promote_after=500), arm(4500), arm(500)).kind for mode in ("shadow", "ab")} == {"wait"}


@pytest.mark.parametrize(
    ("stable", "candidate", "kind"),
    [((500, 1000), (700, 1000), "promote"), ((700, 1000), (500, 1000), "rollback"), ((500, 1000), (510, 1000), "wait"),
     ((0, 0), (1000, 1000), "wait")],
)  # fmt: skip
def test_feedback_decides_between_a_and_b_and_nothing_else(
    stable: tuple[int, int], candidate: tuple[int, int], kind: str
) -> None:
    old, new = (arm(5000, right=right, told=told) for right, told in (stable, candidate))
    verdict = judge(policy("ab"), old, new)
    assert verdict.kind == kind
    assert f"candidate on {candidate[0]} of {candidate[1]} answers" in verdict.reason
    assert judge(policy("canary"), old, new).kind == "wait"


def first_rollback(error_rates: tuple[float, float], seed: int, every: int, requests: int) -> int | None:
    """The candidate's requests when it is rolled back; nine of ten requests go to the stable version."""
    generator = np.random.default_rng(seed)
    old, new = (
        generator.random((requests // every, n)) < rate for n, rate in zip((9 * every, every), error_rates, strict=True)
    )
    failed = np.column_stack((old.sum(axis=1).cumsum(), new.sum(axis=1).cumsum()))
    for look, (stable, candidate) in enumerate(failed.tolist(), start=1):
        seen = every * look
        if judge(policy(), arm(9 * seen, errors=stable), arm(seen, errors=candidate)).kind == "rollback":
            return seen
    return None


@pytest.mark.parametrize(("rate", "within"), [(0.5, 60), (0.2, 200), (0.1, 600)])
def test_a_candidate_that_fails_is_found_within_few_requests(rate: float, within: int) -> None:
    found = [first_rollback((0.01, rate), seed, every=1, requests=within) for seed in range(10)]
    assert all(found), found


def test_a_candidate_that_fails_as_often_as_is_tolerated_stays() -> None:
    assert [first_rollback((0.05, 0.06), seed, every=20, requests=1000) for seed in range(30)].count(None) == 30


@pytest.mark.parametrize("mode", ["canary", "shadow", "ab"])
def test_a_report_is_json_and_tells_what_the_verdict_rests_on(mode: Mode) -> None:
    candidate = arm(40, errors=12, compared=30, disagreed=3, told=4, right=3)
    told = report(policy(mode), arm(360, errors=1), candidate)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["mode"], told["share"]) == (mode, 0.1)
    assert (told["stable"]["requests"], told["candidate"]["requests"]) == (360, 40)
    verdict = judge(policy(mode), arm(360, errors=1), candidate)
    assert (told["verdict"]["kind"], told["verdict"]["reason"]) == (verdict.kind, verdict.reason)
    assert told["candidate"]["errors"]["low"] == verdict.evidence["candidate_error_rate_low"]
    assert told["stable"]["errors"]["high"] == verdict.evidence["stable_error_rate_high"]
    for rate, hits, trials, alpha in (
        (told["agreement"], 27, 30, 0.05 / 4),
        (told["candidate"]["accuracy"], 3, 4, 0.05 / 8),
        (told["stable"]["slow"], 0, 360, 0.05 / 8),
    ):
        assert rate["rate"] == hits / trials
        assert (rate["low"], rate["high"]) == pytest.approx(rate_bounds(hits, trials, alpha))
    assert told["candidate"]["p50_ms"] == told["candidate"]["p99_ms"] == BOUNDS_MS[0]


def test_a_report_of_nothing_knows_nothing() -> None:
    told = report(policy(), arm(), arm())
    assert told["candidate"]["errors"] == {"hits": 0, "trials": 0, "rate": None, "low": 0.0, "high": 1.0}
    assert (told["candidate"]["p99_ms"], told["verdict"]["kind"]) == (None, "wait")
