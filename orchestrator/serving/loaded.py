"""One version of a model in this process's memory, answering in batches.

In: what to serve. Out: answers. A replica of its own holds one, a shelf's replica many. Knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Literal, cast

from orchestrator.data.encoder import PREPROCESS
from orchestrator.errors import IntegrityError
from orchestrator.models.checkpoint import CARD, LABELS
from orchestrator.models.runtimes import RuntimeNetwork
from orchestrator.serving.batching import Batcher
from orchestrator.serving.contract import EXPLAIN_PARTS, Answers, Explained, ExplainRequest, Input, Limits, ModelInfo
from orchestrator.serving.predictor import Prediction, Predictor
from orchestrator.serving.runtime import settled
from orchestrator.serving.served import Served, known_inputs
from orchestrator.storage import Storage


class LoadedModel:
    def __init__(self, served: Served, device: str = "cpu", thread: ThreadPoolExecutor | None = None) -> None:
        """Loads, verifies and warms up. ``thread``: which computes; None for one of its own.

        Raises IntegrityError when a file is not the one that was registered.
        """
        storage, batch = Storage(served.storage), served.scale.max_batch_size
        folder = storage.fetch(served.location, verify=False)  # loading verifies
        loaded = Predictor.from_folder(folder, device, batch, served.settings.max_pixels)
        self.served = served
        # What is converted stays in memory beside the network that explains: on a shelf, memory is what counts.
        place = folder if thread is None else None
        self.predictor = settled(loaded, served.settings, known_inputs(storage, served.location), place)
        is_converted = isinstance(self.predictor.model.network, RuntimeNetwork)
        self.explainer = loaded if is_converted else self.predictor
        self.predictor.warm_up()
        self.explaining = False
        self.batcher: Batcher[Input, Prediction] = Batcher(self.predictor.predict, batch, thread)

    def describe(self) -> ModelInfo:
        model = self.predictor.model
        return _info(self.served, model.task, model.encoder.kind, model.labels, model.precision)

    async def predict(self, version: str | None, inputs: Sequence[Input]) -> Answers:
        """Answers nothing if ``version`` is another than this one's."""
        if version not in (None, str(self.served.version)):
            return Answers(version=str(self.served.version), outputs=[])
        predictions, batch_size, queue_s = await self.batcher.submit(inputs)
        return Answers(
            version=str(self.served.version),
            outputs=[{} if p.error else self.predictor.answer(p) for p in predictions],
            unreadable={index: p.error for index, p in enumerate(predictions) if p.error},
            batch_size=batch_size,
            queue_ms=1000 * queue_s,
            tokens=sum(p.tokens for p in predictions),
        )

    async def explain(self, value: Input, asked: ExplainRequest) -> Explained:
        """In the thread that predicts, between two batches; one at a time. Who would have to wait is turned away."""
        from orchestrator.serving.explain import ExplanationRefused, explain

        version = str(self.served.version)
        if self.explaining:
            return Explained(version=version, busy=True)
        self.explaining = True
        work = self.batcher.thread.submit(explain, self.explainer, value, asked.label, asked.method, EXPLAIN_PARTS)
        work.add_done_callback(self._is_explained)  # who hangs up meanwhile does not end it
        try:
            found = await asyncio.wrap_future(work)
        except ExplanationRefused as error:
            return Explained(version=version, refused=(error.message, error.next_step))
        return Explained(version=version, explanation=asdict(found))

    def _is_explained(self, _: Future[Any]) -> None:
        self.explaining = False

    async def check(self) -> None:
        """Raises what predicting raises."""
        await self.batcher.submit([self.predictor.sample()])


def described(served: Served) -> ModelInfo:
    """What it says of itself once it is loaded, from the small files of its folder; ``precision`` may then differ, if it is
    left to the hardware. Raises IntegrityError when they cannot be read."""
    storage, precision = Storage(served.storage), served.settings.precision
    try:
        files: list[Any] = [storage.read_json(f"{served.location}/{file}") for file in (LABELS, CARD, PREPROCESS)]
        labels, card, preprocess = files
        kind = cast(Literal["text", "image"], preprocess["kind"])
        return _info(served, card["task"], kind, tuple(labels), "bf16" if precision == "bf16" else "fp32")
    except (OSError, ValueError, TypeError, KeyError) as error:
        told = f"{type(error).__name__}: {error}"
        raise IntegrityError(
            f"{storage.place(served.location)} cannot be read ({told})", "restore it from a copy"
        ) from None


def _info(
    served: Served,
    task: str,
    kind: Literal["text", "image"],
    labels: tuple[str, ...],
    precision: Literal["fp32", "bf16"],
) -> ModelInfo:
    settings = served.settings
    limits = Limits(max_instances=settings.max_instances, max_body_bytes=settings.max_body_bytes,
                    request_timeout_s=settings.request_timeout_s,
                    max_pixels=settings.max_pixels if kind == "image" else None)  # fmt: skip
    return ModelInfo(
        model_name=served.name, model_version=str(served.version), task=task, input_kind=kind, labels=labels,
        limits=limits, precision=precision,
    )  # fmt: skip
