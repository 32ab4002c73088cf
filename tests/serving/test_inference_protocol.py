"""Binary tensors behind the JSON, and requests that are made to cost much."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.serving.binary_tensors import JSON_LENGTH, pack_bytes, split_body, unpack_bytes
from orchestrator.serving.contract import Answers, ApiError, Input, Limits, ModelInfo, dump_json
from orchestrator.serving.inference_protocol import InferRequest, infer_answer, read_infer

LIMITS = Limits(max_instances=4, max_body_bytes=10_000_000, request_timeout_s=1.0)
TEXTS = ModelInfo(model_name="reviews", model_version="3", task="text_classification", input_kind="text",
                  labels=("bad", "good"), limits=LIMITS)  # fmt: skip
IMAGES = TEXTS.model_copy(update={"model_name": "digits", "input_kind": "image"})


def request(following: bytes, model: ModelInfo = TEXTS, parameters: Any = None, **changes: Any) -> tuple[bytes, str]:
    """A body and its header: JSON, then a binary tensor."""
    told = {"binary_data_size": len(following)} if parameters is None else parameters
    tensor = {"name": model.input_kind, "shape": [2], "datatype": "BYTES", "parameters": told} | changes
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + following, str(len(head))


def read(following: bytes, model: ModelInfo = TEXTS, **changes: Any) -> list[Input]:
    body, length = request(following, model, **changes)
    return read_infer(body, model, length)[0]


TWO = pack_bytes([b"a", "naïve".encode()])


def test_texts_and_image_files_arrive_as_they_are() -> None:
    assert read(TWO) == ["a", "naïve"]
    assert read(TWO, shape=[2, 1]) == ["a", "naïve"]
    assert read(pack_bytes([b"\x89PNG\xff", b"\0"]), IMAGES) == [b"\x89PNG\xff", b"\0"]


def test_a_body_without_json_is_one_element() -> None:
    assert read_infer(b"a text", TEXTS, "0")[0] == ["a text"]
    inputs, asked = read_infer(b"\x89PNG", IMAGES, "0")
    assert inputs == [b"\x89PNG"] and asked.parameters == {"binary_data_output": True}


@pytest.mark.parametrize(
    ("following", "changes", "message"),
    [
        (
            TWO,
            {"parameters": {"binary_data_size": len(TWO) - 1}},
            "binary_data_size is 14, but 15 bytes follow",
        ),
        (TWO, {"parameters": {"binary_data_size": str(len(TWO))}}, "binary_data_size is '15'"),
        (b"\1", {"parameters": {"binary_data_size": True}, "shape": [1]}, "binary_data_size is True"),
        (TWO, {"parameters": {}}, "binary_data_size is None"),
        (b"", {"parameters": {}}, r"inputs\[0\].data is required"),
        (TWO, {"data": ["a", "b"]}, "data and binary_data_size are both given"),
        (TWO, {"shape": [1]}, "holds 10 bytes more than its 1 elements"),
        (TWO, {"shape": [3]}, "ends within element 2 of 3"),
        (TWO[:-1], {}, "ends within element 1 of 2"),
        (TWO[:6], {}, "ends within element 1 of 2"),
        (struct.pack("<I", 2**32 - 1) + b"a", {"shape": [1]}, "ends within element 0 of 1"),
        (TWO, {"shape": [5]}, "shape holds 5 inputs, more than the 4"),
        (TWO, {"shape": [2**62] * 8}, "more than the 4"),
        (TWO, {"shape": [-1, -2]}, "must hold positive numbers"),
        (TWO, {"shape": []}, "must hold positive numbers"),
        (pack_bytes([b"a", b"\xff"]), {}, r"inputs\[0\].data\[1\] is not UTF-8 at byte 0"),
    ],
)
def test_a_binary_tensor_that_does_not_fit_is_refused(following: bytes, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        read(following, **changes)
    assert refused.value.status == 422


@pytest.mark.parametrize("length", ["", "-1", "1.0", "x", "٣", "9" * 30, "1000"])
def test_a_length_of_the_json_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(ApiError, match=f"{JSON_LENGTH} must be a number of bytes") as refused:
        read_infer(b"{}", TEXTS, length)
    assert (refused.value.status, refused.value.code) == (400, "invalid_binary_data")


OUTPUTS = [
    {"label": "good", "scores": {"bad": 0.25, "good": 0.75}},
    {"label": "bad", "scores": {"bad": 0.5, "good": 0.5}},
]
JUST_LABEL, LABEL_IN_JSON = [{"name": "label"}], [{"name": "label", "parameters": {"binary_data": False}}]


@pytest.mark.parametrize(
    ("asked", "binary"),
    [
        ({}, []),
        ({"parameters": {"binary_data_output": True}}, ["label", "probabilities"]),
        ({"parameters": {"binary_data_output": True}, "outputs": JUST_LABEL}, ["label"]),
        ({"parameters": {"binary_data_output": True}, "outputs": LABEL_IN_JSON}, []),
        ({"outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}, *JUST_LABEL]}, ["probabilities"]),
    ],
)
def test_outputs_follow_the_json_where_that_is_asked(asked: dict[str, Any], binary: list[str]) -> None:
    inputs = [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]
    answer, following = infer_answer(
        Answers(version="3", outputs=OUTPUTS), TEXTS, InferRequest.model_validate({"inputs": inputs} | asked), "r-1"
    )
    assert [output["name"] for output in answer["outputs"] if "data" not in output] == binary
    expected = {"label": pack_bytes([b"good", b"bad"]), "probabilities": struct.pack("<4f", 0.25, 0.75, 0.5, 0.5)}
    assert following == b"".join(expected[name] for name in binary)
    sizes = [output["parameters"]["binary_data_size"] for output in answer["outputs"] if "data" not in output]
    assert sum(sizes) == len(following)


@pytest.mark.parametrize("value", [1, "true", None, []])
def test_binary_outputs_are_asked_for_in_booleans(value: Any) -> None:
    for asked in ({"parameters": {"binary_data_output": value}},
                  {"outputs": [{"name": "label", "parameters": {"binary_data": value}}]}):  # fmt: skip
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]} | asked
        with pytest.raises(ApiError, match="ask for binary_data with .* neither true nor false"):
            read_infer(json.dumps(body).encode(), TEXTS)


@settings(max_examples=200)
@given(elements=st.lists(st.binary(max_size=20), max_size=6))
def test_what_was_packed_is_unpacked(elements: list[bytes]) -> None:
    assert unpack_bytes(pack_bytes(elements), len(elements)) == elements


numbers = st.integers() | st.sampled_from([-1, 0, 1, 2, 4, 5, 9, 13])
lengths = st.none() | st.text(max_size=4) | numbers.map(str)


@settings(max_examples=500)
@given(
    following=st.binary(max_size=30) | st.lists(st.binary(max_size=5), max_size=5).map(pack_bytes),
    size=st.none() | numbers | st.booleans() | st.text(max_size=3),
    shape=st.lists(numbers, max_size=3),
    data=st.none() | st.lists(st.text(max_size=2), max_size=2),
    length=lengths | st.just("right"),
    model=st.sampled_from([TEXTS, IMAGES]),
)
def test_any_binary_request_is_taken_or_refused_but_never_fails(
    following: bytes, size: Any, shape: list[int], data: Any, length: str | None, model: ModelInfo
) -> None:
    parameters = {} if size is None else {"binary_data_size": len(following) if size is True else size}
    body, right = request(following, model, parameters, shape=shape, **({} if data is None else {"data": data}))
    try:
        inputs, _ = read_infer(body, model, right if length == "right" else length)
    except ApiError as refused:
        assert refused.status in {400, 422}
        json.loads(dump_json(refused.body("/v2")))
    else:
        assert 0 < len(inputs) <= LIMITS.max_instances


@settings(max_examples=200)
@given(body=st.binary(max_size=60), length=lengths)
def test_a_body_is_split_in_two_or_refused(body: bytes, length: str | None) -> None:
    try:
        head, following = split_body(body, length)
    except ValueError:
        return
    assert head + following == body


def many(value: str, count: int) -> str:
    return "[" + ",".join([value] * count) + "]"


def shaped(shape: str) -> str:
    return '{"inputs": [{"name": "text", "datatype": "BYTES", "data": ["a"], "shape": ' + shape + "}]}"


COSTLY = {
    "a product of large numbers": lambda: shaped(many("9" * 4000, 1000)),
    "many wrong sizes": lambda: shaped(many('""', 2_000_000)),
    "many wrong tensors": lambda: '{"inputs": ' + many("1", 2_000_000) + "}",
    "many wrong outputs": lambda: '{"inputs": [], "outputs": ' + many("1", 2_000_000) + "}",
    "many keys, and the last one twice": lambda: (
        "{" + "".join(f'"{key}": 1, ' for key in range(200_000)) + '"199999": 1}'
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_body_of_megabytes_is_refused_at_once(name: str) -> None:
    """The event loop that reads it answers nobody meanwhile. Without care each of these takes seconds to minutes; with it,
    one or two times what it takes to read the JSON."""
    body = COSTLY[name]().encode()
    started = time.process_time()
    json.loads(body)
    read = time.process_time()
    with pytest.raises(ApiError):
        read_infer(body, TEXTS)
    assert time.process_time() - read < 12 * (read - started)
