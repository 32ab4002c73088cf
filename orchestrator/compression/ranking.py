"""Which parts stay: the most important ones of the whole network, with a few in each place.

Pure: scores in, positions out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence


def keep_best(
    scores: Mapping[str, Sequence[float]],
    share: float,
    least: Callable[[int], int],
    work: Mapping[str, float] | None = None,
) -> dict[str, list[int]]:
    """Place -> positions that stay, ascending: ``share`` of all parts, those with the highest scores.

    ``least``: how many stay in a place with so many, whatever they score. ``work``: what a part costs in each place; then
    ``share`` is that of the cost, and the highest scores for it stay.
    """
    work = work or dict.fromkeys(scores, 1.0)
    ranked = {place: _ranked(values) for place, values in scores.items()}
    kept = {place: set(positions[: least(len(positions))]) for place, positions in ranked.items()}
    room = share * sum(work[place] * len(positions) for place, positions in ranked.items())
    room -= sum(work[place] * len(positions) for place, positions in kept.items())
    others = [
        (-scores[place][p] / work[place], place, p)
        for place, positions in ranked.items()
        for p in positions
        if p not in kept[place]
    ]
    for _, place, position in sorted(others):
        room -= work[place]
        if room < -work[place] / 2:  # to the nearest
            break
        kept[place].add(position)
    return {place: sorted(positions) for place, positions in kept.items()}


def rounded(
    kept: Mapping[str, Sequence[int]], scores: Mapping[str, Sequence[float]], multiple: int
) -> dict[str, list[int]]:
    """The same with the number in each place rounded to a multiple: kernels compute those faster."""
    return {
        place: sorted(_ranked(scores[place])[: round_to(len(positions), multiple, len(scores[place]))])
        for place, positions in kept.items()
    }


def round_to(count: int, multiple: int, most: int) -> int:
    """The nearest multiple, at least one of it, at most ``most``."""
    return min(most, max(multiple, math.floor(count / multiple + 0.5) * multiple))


def _ranked(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda position: (-values[position], position))
