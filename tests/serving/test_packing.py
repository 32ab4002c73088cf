"""Which rows share a pass: against every other way of grouping them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.serving.packing import packed, price_of_a_pass


def cost(groups: list[list[int]], lengths: list[int], pass_tokens: float) -> float:
    return sum(pass_tokens + len(group) * max(lengths[row] for row in group) for group in groups)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for place in range(len(rest)):
            yield [*rest[:place], [rows[0], *rest[place]], *rest[place + 1 :]]


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 4), st.sampled_from([0.0, 3.0, 20.0, 500.0]))
def test_no_other_grouping_costs_less(lengths: list[int], max_rows: int, pass_tokens: float) -> None:
    groups = packed(lengths, max_rows, pass_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) <= max_rows for group in groups)
    allowed = (each for each in partitions(list(range(len(lengths)))) if all(len(group) <= max_rows for group in each))
    least = min(cost(each, lengths, pass_tokens) for each in allowed)
    assert cost(groups, lengths, pass_tokens) == pytest.approx(least)


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 8))
def test_where_a_pass_is_all_that_costs_there_are_as_few_as_can_be(lengths: list[int], max_rows: int) -> None:
    groups = packed(lengths, max_rows, math.inf)
    assert len(groups) == -(-len(lengths) // max_rows)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))


def test_rows_alike_are_not_torn_apart() -> None:
    assert packed([7] * 5, 4, 0.0) == [[0, 1, 2, 3], [4]]


def test_the_time_to_pack_grows_as_the_rows() -> None:
    def seconds(rows: int) -> float:
        lengths = [1 + 37 * row % 127 for row in range(rows)]
        taken = []
        for _ in range(3):
            began = time.process_time()
            assert len(packed(lengths, 32, 40.0)) >= rows / 32
            taken.append(time.process_time() - began)
        return min(taken)

    assert seconds(4096) < 4 * 8 * seconds(512), "eight times the rows"


def test_the_price_of_a_pass() -> None:
    assert price_of_a_pass(one_s=5 + 8 * 0.1, many_s=5 + 32 * 8 * 0.1, rows=32, length=8) == pytest.approx(50.0)
    assert price_of_a_pass(one_s=5.0, many_s=5.0, rows=32, length=8) == math.inf, "a GPU that has room for all"
    assert price_of_a_pass(one_s=0.5, many_s=32.0, rows=32, length=8) == 0.0
