"""What clients may send, and what they are told when it is wrong."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.serving import contract
from orchestrator.serving.contract import (
    Answers,
    ApiError,
    Limits,
    ModelInfo,
    dump_json,
    parse_json,
    predict_answer,
    read_explain,
    read_feedback,
    read_predict,
)
from orchestrator.serving.inference_protocol import infer_answer, read_infer

LIMITS = Limits(max_instances=4, max_body_bytes=10_000, request_timeout_s=1.0)
TEXTS = ModelInfo(model_name="reviews", model_version="3", task="text_classification", input_kind="text",
                  labels=("bad", "good"), limits=LIMITS)  # fmt: skip
IMAGES = TEXTS.model_copy(update={"model_name": "digits", "input_kind": "image"})
PIXELS = b"\x89PNG..."
B64 = base64.b64encode(PIXELS).decode()


def predict(value: Any, model: ModelInfo = TEXTS) -> list[str | bytes]:
    return read_predict(value if isinstance(value, bytes) else json.dumps(value).encode(), model)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]} | changes]}


def test_texts_arrive_as_they_were_sent() -> None:
    texts = ["", "plain", "naïve 🙂", "two\nlines \u0000"]
    assert predict({"instances": texts}) == texts


def test_a_byte_order_mark_does_not_matter() -> None:
    assert predict(b'\xef\xbb\xbf{"instances": ["a"]}') == ["a"]


def test_images_arrive_as_the_bytes_of_their_files() -> None:
    assert predict({"instances": [{"b64": B64}]}, IMAGES) == [PIXELS]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Expecting value"),
        (b"instances", "Expecting value"),
        (b'{"instances": ["a"]', "delimiter"),
        (b'{"instances": ["\xff"]}', "byte 16 is not UTF-8"),
        (b'{"instances": [NaN]}', "NaN is not a JSON number"),
        (b'{"instances": [-Infinity]}', "Infinity is not"),
        (b'{"instances": [1e999]}', "too large"),
        (b'{"instances": [' + b"9" * 5000 + b"]}", "the number 9+ is too large"),
        (b'{"instances": ["a"], "instances": ["b"]}', "'instances' is given twice"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
    ],
)
def test_what_is_not_strict_json_is_refused_as_400(body: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as refused:
        predict(body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the body must be a JSON object, but is a list"),
        ({}, "instances is required"),
        ({"instances": []}, "instances is not valid"),
        ({"instances": "a"}, "instances is not valid.*list"),
        ({"instances": None}, "instances is not valid"),
        ({"instance": ["a"], "instances": ["a"]}, "instance is not a field; known here are instances"),
        ({"instances": ["a", 7]}, r"instances\[1\] must be a text.*but is a number"),
        ({"instances": ["a", ["b"]]}, r"instances\[1\] must be a text.*but is a list"),
        ({"instances": [{"b64": B64}]}, r"instances\[0\] must be a text, since reviews classifies texts"),
        ({"instances": ["a"] * 5}, "instances holds 5 inputs, more than the 4"),
        ({"instances": ["x" * 1_000_001]}, r"instances\[0\] has 1000001 characters"),
        ({"instances": ["a", "half \ud800"]}, r"instances\[1\] holds half a surrogate pair at character 5"),
    ],
)
def test_what_a_text_model_cannot_take_is_named_by_its_field(value: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        predict(value)
    assert (refused.value.status, refused.value.code) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ("a text", r'instances\[0\] must be {"b64": "..."}, since digits classifies images, but is a text'),
        ({"b64": 3}, r"instances\[0\] must be"),
        ({"b64": B64, "url": "http://x"}, r"instances\[0\] must be"),
        ({"b64": "not base64!"}, r"instances\[0\] is not base64"),
        ({"b64": "abc"}, r"instances\[0\] is not base64"),
        ({"b64": "ü"}, r"instances\[0\] is not base64"),
    ],
)
def test_what_an_image_model_cannot_take_is_named_by_its_field(instance: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        predict({"instances": [instance]}, IMAGES)


@pytest.mark.parametrize("data", [["a", "b"], [["a"], ["b"]]])
@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_tensors_come_flat_or_nested(data: list[Any], shape: list[int]) -> None:
    inputs, _ = read_infer(json.dumps(tensor(data=data, shape=shape)).encode(), TEXTS)
    assert inputs == ["a", "b"]


def test_image_tensors_hold_base64() -> None:
    body = json.dumps(tensor(name="image", shape=[1], data=[B64])).encode()
    assert read_infer(body, IMAGES)[0] == [PIXELS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "input_ids"}, r"inputs\[0\].name must be 'text', but is 'input_ids'"),
        ({"datatype": "FP32"}, r"inputs\[0\].datatype must be 'BYTES', but is 'FP32'"),
        ({"shape": [3]}, r"inputs\[0\].shape is a list, but data holds 2 values"),
        ({"shape": [-1, -2]}, r"inputs\[0\].shape"),
        ({"shape": []}, r"inputs\[0\].shape"),
        ({"shape": ["2"]}, r"inputs\[0\].shape\[0\] is not valid"),
        ({"data": ["a", None]}, r"inputs\[0\].data\[1\] must be a text"),
        ({"extra": 1}, r"inputs\[0\].extra is not a field"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_by_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        read_infer(json.dumps(tensor(**changes)).encode(), TEXTS)
    assert refused.value.status == 422


def test_unknown_outputs_are_refused() -> None:
    with pytest.raises(ApiError, match="outputs names 'logits'"):
        read_infer(json.dumps(tensor() | {"outputs": [{"name": "logits"}]}).encode(), TEXTS)


def test_feedback_takes_only_the_models_labels() -> None:
    assert read_feedback(b'{"request_id": "r-1", "label": "bad"}', TEXTS).index == 0
    with pytest.raises(ApiError, match="label must be one of bad, good, but is 'ugly'"):
        read_feedback(b'{"request_id": "r-1", "label": "ugly"}', TEXTS)
    with pytest.raises(ApiError, match="request_id"):
        read_feedback(b'{"request_id": "no spaces", "label": "bad"}', TEXTS)


OUTPUTS = [
    {"label": "good", "scores": {"bad": 0.25, "good": 0.75}},
    {"label": "bad", "scores": {"bad": 0.5, "good": 0.5}},
]


def test_answers_of_both_protocols_agree() -> None:
    answers = Answers(version="3", outputs=OUTPUTS)
    first = predict_answer(answers, TEXTS, "r-1")
    assert first == {"predictions": OUTPUTS, "model_name": "reviews", "model_version": "3", "request_id": "r-1"}
    _, asked = read_infer(json.dumps(tensor() | {"id": "mine"}).encode(), TEXTS)
    second, _ = infer_answer(answers, TEXTS, asked, "r-1")
    assert (second["id"], second["model_version"]) == ("mine", "3")
    label, probabilities = second["outputs"]
    assert (label["data"], label["shape"]) == (["good", "bad"], [2])
    assert (probabilities["data"], probabilities["shape"]) == ([0.25, 0.75, 0.5, 0.5], [2, 2])


def test_only_the_outputs_asked_for_are_sent() -> None:
    _, asked = read_infer(json.dumps(tensor() | {"outputs": [{"name": "label"}]}).encode(), TEXTS)
    sent, _ = infer_answer(Answers(version="3", outputs=OUTPUTS), TEXTS, asked, "r-1")
    assert [output["name"] for output in sent["outputs"]] == ["label"]


def test_unreadable_inputs_are_named_with_their_reason() -> None:
    answers = Answers(version="3", outputs=[{}, {}], unreadable={1: "is not an image of a known format"})
    with pytest.raises(ApiError, match=r"instances\[1\] is not an image of a known format") as refused:
        predict_answer(answers, IMAGES, "r-1")
    assert refused.value.code == "unreadable_input"


def test_metadata_names_the_tensors() -> None:
    metadata = IMAGES.metadata(["3"])
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert metadata["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}


def test_half_a_surrogate_pair_in_an_echo_is_still_json() -> None:
    assert json.loads(dump_json({"a": "x\ud800"})) == {"a": "x\ud800"}


LARGE = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [' + b"{}," * LARGE + b"1]}",
        b'{"instances": ' + b"[" * LARGE,
        b'{"instances": [' + b"1," * LARGE + b"1]}",
        b'{"instances": [' + b'"",' * LARGE + b'""]}',
        b"{" + b",".join(b'"%d": 1' % number for number in range(LARGE)) + b"}",
        b'{"instances": ["\\\\", ' + b'"\\"",' * LARGE + b'""]}',
    ],
    ids=["objects", "nested", "numbers", "texts", "keys", "escapes"],
)
@pytest.mark.parametrize("read", [read_predict, read_infer, read_explain, read_feedback])
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    body: bytes, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "parse_json", None)
    with pytest.raises(ApiError, match="holds more values than any request to reviews does.* 4 instances") as refused:
        read(body, TEXTS)
    assert refused.value.status == 422


def test_what_stands_in_a_text_counts_as_no_value() -> None:
    texts = ["{[,:" * LARGE, '"' * LARGE, "\\" * LARGE, '\\"[]{},' * LARGE]
    assert predict({"instances": texts}) == texts


def test_as_many_images_as_a_request_may_hold_are_not_too_many_values() -> None:
    model = IMAGES.model_copy(update={"limits": LIMITS.model_copy(update={"max_instances": LARGE})})
    assert len(predict({"instances": [{"b64": B64}] * LARGE}, model)) == LARGE


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
keyed = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("instances", "inputs", "outputs", "id", "parameters", "label", "request_id"), anything),
)


@settings(max_examples=300)
@given(value=anything | keyed, model=st.sampled_from([TEXTS, IMAGES]))
def test_any_json_is_taken_or_refused_but_never_fails(value: Any, model: ModelInfo) -> None:
    body = json.dumps(value).encode()
    for read in (read_predict, read_infer, read_feedback):
        try:
            read(body, model)
        except ApiError as refused:
            assert refused.status in {400, 422}
            json.loads(dump_json(refused.body()))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        parse_json(body)
    except ApiError as refused:
        assert refused.status == 400
