"""Answers that were given, for inputs that come again.

In: inputs, and what one version answered. Out: the same answers, as long as they fit in memory; the least recently used goes
first. A version always answers alike, so an answer never grows old: a new version gets a new cache. Pure.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Any

from orchestrator.serving.contract import Answers, Input

_ENTRY_BYTES = 250
"""Of an entry, besides its answer."""


class AnswerCache:
    """Belongs to one event loop. Inputs themselves are not kept, only hashes that nobody else can make."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held_bytes = max_bytes, 0
        self._salt = os.urandom(16)
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def known(self, inputs: Sequence[Input]) -> dict[int, dict[str, Any]]:
        """Index of an input -> its answer, of those that are here."""
        found = {}
        for index, value in enumerate(inputs):
            key = self._key(value)
            if (answer := self._answers.get(key)) is not None:
                self._answers.move_to_end(key)
                found[index] = json.loads(answer)
        return found

    def keep(self, value: Input, answer: dict[str, Any]) -> None:
        key, packed = self._key(value), json.dumps(answer).encode()
        self._forget(key)
        self._answers[key] = packed
        self.held_bytes += _ENTRY_BYTES + len(packed)
        while self.held_bytes > self.max_bytes:
            self._forget(next(iter(self._answers)))

    def _forget(self, key: bytes) -> None:
        if (packed := self._answers.pop(key, None)) is not None:
            self.held_bytes -= _ENTRY_BYTES + len(packed)

    def _key(self, value: Input) -> bytes:
        """A text and an image of the same bytes differ."""
        content, kind = (value.encode(), b"t") if isinstance(value, str) else (value, b"i")
        return blake2b(content, digest_size=16, key=self._salt, person=kind).digest()


async def remembered(
    cache: AnswerCache, version: str, ask: Callable[[Sequence[Input]], Awaitable[Answers]], inputs: Sequence[Input]
) -> Answers:
    """From memory, what is there; the rest is asked for. ``version``: whose answers the cache holds."""
    found = cache.known(inputs)
    missing = [index for index in range(len(inputs)) if index not in found]
    if not missing:
        return Answers(version=version, outputs=list(found.values()), cached=len(found))
    answers = await ask([inputs[index] for index in missing])
    if answers.version != version:  # a new version has just come: one request, one version
        return await ask(inputs) if found else answers
    for place, index in enumerate(missing):
        found[index] = answers.outputs[place]
        if place not in answers.unreadable:
            cache.keep(inputs[index], answers.outputs[place])
    unreadable = {missing[place]: reason for place, reason in answers.unreadable.items()}
    outputs, cached = [found[index] for index in range(len(inputs))], len(inputs) - len(missing)
    return answers.model_copy(update={"outputs": outputs, "unreadable": unreadable, "cached": cached})
