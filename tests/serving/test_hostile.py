"""Whatever a client sends: an answer below 500 in the contract's shape, and the endpoint goes on answering.

The whole face and a real predictor, without Ray: bodies that were valid and have been damaged, JSON of every shape, and
images that are none, or too much. How many: a few hundred here, thousands with ``-m slow``.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import random
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from served_models import LABELS, png, publish_image_model, publish_text_model

from orchestrator.serving import gateway
from orchestrator.serving.access import Keys
from orchestrator.serving.contract import Answers, Caller, Explained, ExplainRequest, Input, Limits, ModelInfo
from orchestrator.serving.gateway import build_app
from orchestrator.serving.predictor import Predictor
from orchestrator.storage import Storage

LIMITS = Limits(max_instances=8, max_body_bytes=300_000, request_timeout_s=30.0)
PATHS = ("/v1/models/reviews:predict", "/v1/models/shapes:predict", "/v2/models/reviews/infer", "/v2/models/shapes/infer",
         "/v1/models/reviews:feedback")  # fmt: skip


class InProcess:
    """Models whose replicas are here."""

    def __init__(self, predictors: dict[str, Predictor]) -> None:
        self.predictors = predictors

    async def names(self) -> list[str]:
        return sorted(self.predictors)

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        if name not in self.predictors:
            return None
        model = self.predictors[name].model
        return ModelInfo(model_name=name, model_version="1", task=model.task, input_kind=model.encoder.kind,
                         labels=LABELS, limits=LIMITS)  # fmt: skip

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        predictor = self.predictors[name]
        found = predictor.predict(inputs)
        return Answers(version="1", outputs=[{} if p.error else predictor.answer(p) for p in found],
                       unreadable={i: p.error for i, p in enumerate(found) if p.error}, batch_size=len(inputs))  # fmt: skip

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        return Explained(version="3", explanation={"label": asked.label or "good", "method": "occlusion"})

    async def rollout(self, name: str) -> dict[str, Any] | None:
        return None

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        json.dumps(entry)

    def keys(self, name: str) -> Keys | None:
        return None

    def is_ready(self, name: str) -> bool:
        return True


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Any:
    storage = Storage(str(tmp_path_factory.mktemp("served")))
    places = {"reviews": publish_text_model(storage, "reviews", 1, tiny_backbone),
              "shapes": publish_image_model(storage, "shapes", 1)}  # fmt: skip
    return build_app(InProcess({name: Predictor.from_folder(storage.path(place)) for name, place in places.items()}))


Request = tuple[str, bytes, dict[str, str]]
"""Path, body, headers."""


def send(app: Any, requests: Sequence[Request]) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return [await client.post(path, content=body, headers=headers) for path, body, headers in requests]

    return asyncio.run(all_of_them())


def check(app: Any, requests: Sequence[Request]) -> list[int]:
    """Statuses, after each answer was looked at and the endpoint was asked something sensible."""
    responses = send(app, requests)
    for (path, body, _), response in zip(requests, responses, strict=True):
        told = f"{path} {body[:200]!r} -> {response.status_code} {response.text[:300]}"
        assert response.status_code < 500, told
        assert "Traceback" not in response.text and "/site-packages/" not in response.text, told
        assert response.headers["content-type"].startswith("application/json"), told
        if response.status_code != 200:
            error = response.json()["error"]
            assert (
                isinstance(error, str) if path.startswith("/v2") else set(error) == {"code", "message", "next_step"}
            ), told
            assert len(response.content) < 2500, told
    fine = send(app, [(PATHS[0], b'{"instances": ["fine"]}', {}), (PATHS[1], _image_body(png(1)), {})])
    assert [response.status_code for response in fine] == [200, 200]
    return [response.status_code for response in responses]


def _image_body(*files: bytes) -> bytes:
    return json.dumps({"instances": [{"b64": base64.b64encode(file).decode()} for file in files]}).encode()


def _valid(path: str, chance: random.Random) -> bytes:
    texts = [f"text {chance.random()}" for _ in range(chance.randint(1, 3))]
    if path.endswith("feedback"):
        return json.dumps({"request_id": "a", "label": "good"}).encode()
    if "shapes" in path and path.startswith("/v1"):
        return _image_body(png(chance.randint(0, 9)))
    if path.startswith("/v1"):
        return json.dumps({"instances": texts}).encode()
    kind = "image" if "shapes" in path else "text"
    data = [base64.b64encode(png(1)).decode()] if kind == "image" else texts
    return json.dumps({"inputs": [{"name": kind, "datatype": "BYTES", "shape": [len(data)], "data": data}]}).encode()


def damaged(path: str, chance: random.Random) -> bytes:
    """A valid body in which bytes were changed, left out, doubled or put in."""
    body = bytearray(_valid(path, chance))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(max(1, len(body)))
        match chance.randint(0, 4):
            case 0:
                body[at : at + 1] = bytes([chance.randint(0, 255)])
            case 1:
                del body[at : at + chance.randint(1, 20)]
            case 2:
                body[at:at] = body[at : at + chance.randint(1, 40)]
            case 3:
                body[at:at] = chance.choice(_SPICES)
            case 4:
                body = body[:at]
    return bytes(body)


_SPICES = (b"NaN", b"1e999", b"-0", b"null", b"\\ud800", b"\x00", b"\xff\xfe", b'"', b"[[[[", b"{}", b"9" * 400, b"true",
           "\u202e\u0000\U0010ffff".encode(), b'{"b64":1}', b"\\u0000")  # fmt: skip


def any_json(chance: random.Random, depth: int = 4) -> Any:
    """Values of every kind, with the contract's own field names among the keys."""
    match chance.randint(0, 9 if depth else 5):
        case 0:
            return chance.choice([None, True, False])
        case 1:
            return chance.choice([0, -1, 2**63, 10**400, 1.5, -1e308, 5e-324])
        case 2 | 3:
            return chance.choice(
                ["", "a" * chance.randint(0, 3000), "\ud800", "\x00", "é" * 50, "BYTES", "image", "text"]
            )
        case 4 | 5:
            return base64.b64encode(chance.randbytes(chance.randint(0, 60))).decode()
        case 6 | 7:
            return [any_json(chance, depth - 1) for _ in range(chance.randint(0, 10))]
    names = ("instances", "inputs", "name", "shape", "datatype", "data", "b64", "request_id", "label", "index", "id",
             "outputs", "parameters", "x")  # fmt: skip
    return {chance.choice(names): any_json(chance, depth - 1) for _ in range(chance.randint(0, 6))}


def shaped(path: str, chance: random.Random) -> bytes:
    """JSON of the right outline with anything inside."""
    outline: dict[str, Any] = {"instances": any_json(chance)}
    if path.startswith("/v2"):
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
        tensor[chance.choice(list(tensor))] = any_json(chance)
        outline = {"inputs": [tensor]}
    elif path.endswith("feedback"):
        outline = {
            "request_id": "a",
            "label": "good",
            chance.choice(["request_id", "label", "index"]): any_json(chance),
        }
    return json.dumps(outline).encode()


def anything(path: str, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(0, 400)) if chance.random() < 0.5 else json.dumps(any_json(chance)).encode()


def bodies(seed: int, count: int) -> list[Request]:
    chance = random.Random(seed)
    kinds: list[Callable[[str, random.Random], bytes]] = [damaged, shaped, anything]
    return [(path := chance.choice(PATHS), chance.choice(kinds)(path, chance), {}) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_malformed_bodies(seed: int, app: Any) -> None:
    statuses = check(app, bodies(seed, 200))
    assert {400, 422} <= set(statuses), "they were malformed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_ten_thousand_malformed_bodies(seed: int, app: Any) -> None:
    check(app, bodies(seed, 500))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose few bytes unfold to all these pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (
        zlib.compress(bytes(1_000_000), 9) if width * height > 1_000_000 else zlib.compress(bytes((width + 1) * height))
    )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small image with a comment that unfolds to a hundred megabytes."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = file.getvalue()
    packed = b"zTXt" + b"a\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(packed) - 4) + packed + struct.pack(">I", zlib.crc32(packed))
    return content[:33] + chunk + content[33:]


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (20, 10), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


IMAGES = {
    "a bomb": bomb(30_000, 30_000), "the largest": bomb(2**31 - 1, 2**31 - 1), "no width": bomb(0, 5),
    "a text bomb": text_bomb(),
    "cut off": png(1)[: len(png(1)) // 2], "a header": png(1)[:8], "nothing": b"", "svg": b"<svg/>", "a page": b"<html>",
    "a zip": b"PK\x03\x04" + bytes(100), "one pixel": saved("PNG", size=(1, 1)), "a line": saved("PNG", size=(20_000, 1)),
    "bits": saved("PNG", "1"), "palette": saved("GIF", "P"), "ink": saved("JPEG", "CMYK"), "sixteen": saved("PNG", "I;16"),
    "bmp": saved("BMP"), "tiff": saved("TIFF"), "webp": saved("WEBP"), "icon": saved("ICO", size=(16, 16)),
    "frames": saved("GIF", "P", save_all=True, append_images=[Image.new("P", (20, 10))] * 50),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file", "tail": png(1) + bytes(1000),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_none_or_too_much(name: str, app: Any) -> None:
    (status,) = check(app, [(PATHS[1], _image_body(IMAGES[name]), {})])
    assert status in (200, 422) or len(IMAGES[name]) * 4 / 3 > LIMITS.max_body_bytes
    if "bomb" in name or name in {"the largest", "cut off", "nothing", "a page", "a zip", "postscript"}:
        assert status in (413, 422)


@pytest.mark.parametrize("seed", range(2))
def test_images_with_damaged_bytes(seed: int, app: Any) -> None:
    chance = random.Random(seed)
    requests: list[Request] = []
    for _ in range(60):
        content = bytearray(
            chance.choice([png(3), saved("JPEG"), saved("GIF", "P"), saved("WEBP"), saved("TIFF"), saved("BMP")])
        )
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randint(0, 255)
        requests.append((PATHS[1], _image_body(bytes(content)), {}))
    check(app, requests)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"[" * 60_000, {}, 400), (b'{"instances":' * 5_000, {}, 400), (b"[" * 200_000, {}, 422),
        (b'{"instances": [' + b"[" * 900 + b"]" * 900 + b"]}", {}, 422),
        (gzip.compress(bytes(10_000_000)), {"content-encoding": "gzip"}, 415), (bytes(400_000), {}, 413),
        (b'{"instances": ["' + b"a" * 299_000 + b'"]}', {}, 200), (b"{}", {"content-length": "-5"}, 422),
        (b"{}", {"content-type": "a/" + "b" * 9000}, 422), (b"{}", {"x-request-id": "a" * 20_000}, 422),
        (b'{"instances": ["a"]}', {"content-type": "application/x-www-form-urlencoded"}, 200),
        (b'{"instances": ["a"], "instances": ["b"]}', {}, 400), (b'{"instances": [1e999]}', {}, 400),
        (json.dumps({"instances": ["a"] * 9}).encode(), {}, 422), ("\ufeff{\"instances\": [\"a\"]}".encode(), {}, 200),
    ],
)  # fmt: skip
def test_bodies_and_headers_that_are_too_much(body: bytes, headers: dict[str, str], status: int, app: Any) -> None:
    assert check(app, [(PATHS[0], body, headers)]) == [status]


def test_a_large_body_is_read_in_a_thread_of_its_own() -> None:
    def thread(body: bytes) -> int:
        return threading.get_ident()

    assert asyncio.run(gateway._read(thread, bytes(gateway._LARGE_BYTES))) != threading.get_ident()
    assert asyncio.run(gateway._read(thread, b"{}")) == threading.get_ident()
