"""Which rows share a forward pass. Rows of one pass are padded to its longest, and each pass has a price of its own.

In: lengths in tokens, and what a pass costs however little is in it. Out: groups of rows. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def packed(lengths: Sequence[int], max_rows: int, pass_tokens: float) -> list[list[int]]:
    """Positions of all rows, in the groups that cost least together: a group of n rows up to ``longest`` tokens costs
    ``pass_tokens + n * longest``, and has ``max_rows`` at most.

    ``pass_tokens``: what a pass costs by itself, in tokens that could be computed instead; infinite: as few passes as there can
    be. Optimal, since an optimal group is a run of the rows in order of length; takes len(lengths) * max_rows steps.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if math.isinf(pass_tokens) or (lengths and lengths[order[0]] == lengths[order[-1]]):
        return [order[start : start + max_rows] for start in range(0, len(order), max_rows)]
    least, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        starts = range(max(0, end - max_rows), end)
        cost, start = min((least[start] + pass_tokens + (end - start) * longest, start) for start in starts)
        least.append(cost)
        begins.append(start)
    groups, end = list[list[int]](), len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def price_of_a_pass(one_s: float, many_s: float, rows: int, length: int) -> float:
    """``pass_tokens`` from two measurements: seconds for one row, and for ``rows`` rows, each of ``length`` tokens."""
    token_s = (many_s - one_s) / ((rows - 1) * length)
    return math.inf if token_s <= 0.0 else max(0.0, one_s / token_s - length)
