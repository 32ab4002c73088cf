"""Where the words of a text are, in any script: what an explanation of it speaks of.

In: a text. Out: spans of characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np


def words_of(text: str, seen: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Characters of the words that begin among the ``seen`` first ones; and of what comes after them, if anything does."""
    near = text[: cast(re.Match[str], re.compile(r"\S*").match(text, seen)).end()]  # all of the last word
    spans = [span for _, span in _splitter().pre_tokenize_str(near)]
    words = [span for span in spans if span[0] < seen]
    end = words[-1][1] if words else 0
    rest = text[end:].strip()
    start = text.index(rest, end)
    return words, [(start, start + len(rest))] if rest and seen < len(text) else []


@cache
def _splitter() -> Any:
    """Splits any script: words with their marks, apostrophes, hyphens and decimal points; ideographs one by one, as they are
    written without spaces; runs of punctuation; emoji and all else as it is shown."""
    from tokenizers import Regex, pre_tokenizers

    ideograph = r"\p{Han}\p{Hiragana}\p{Katakana}"
    letters = rf"[\p{{L}}\p{{M}}\p{{N}}_\x{{200C}}\x{{200D}}&&[^{ideograph}]]+"
    word = rf"{letters}(?:['’-]{letters}|(?<=\p{{N}})[.,]\p{{N}}+)*"
    pattern = rf"[{ideograph}]|{word}|\p{{P}}+\p{{M}}*|(?!\s)\X"
    return pre_tokenizers.Split(Regex(pattern), "removed", invert=True)


def merged(spans: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Neighbours together, so that no more are left, all of about as many words."""
    bounds = np.linspace(0, len(spans), min(most, len(spans)) + 1).astype(int).tolist()
    return [(spans[first][0], spans[after - 1][1]) for first, after in pairwise(bounds)]
