"""The Open Inference Protocol, ``/v2``: what an infer request asks, and what it is answered, in JSON or as binary tensors.

In: a request's body as bytes. Out: checked inputs, or an ``ApiError`` that names the field; and the body of an answer.
Knows no HTTP server, no network and no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import FailFast, Field, WithJsonSchema

from orchestrator.serving.binary_tensors import pack_outputs, split_body, unpack_bytes
from orchestrator.serving.contract import (
    LABEL,
    PROBABILITIES,
    Answers,
    ApiError,
    Input,
    ModelInfo,
    Shape,
    check_count,
    checked,
    read_inputs,
    read_text,
    refuse,
    refuse_unreadable,
    shown,
)

_MAX_DIMENSIONS = 8
"""Of a tensor: the product of millions of numbers would take minutes."""


def _one_of(*values: str) -> Any:
    """What is told in the schema alone: a request is refused with words of our own."""
    return Field(json_schema_extra={"enum": list(values)})


_Size = Annotated[int, Field(lt=2**63, json_schema_extra={"minimum": 1})]
_Data = Annotated[list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": ["string", "array"]}})]


class InferInput(Shape):
    name: Annotated[str, _one_of("text", "image")]
    shape: Annotated[list[_Size], Field(max_length=_MAX_DIMENSIONS, json_schema_extra={"minItems": 1}), FailFast()]
    datatype: Annotated[str, _one_of("BYTES")]
    data: _Data | None = None
    """Left out where the tensor follows the JSON."""
    parameters: dict[str, Any] = {}
    """``binary_data_size``: how many bytes of it follow the JSON, each element with its length (4 bytes) before it."""


class InferOutput(Shape):
    name: Annotated[str, _one_of(LABEL, PROBABILITIES)]
    parameters: dict[str, Any] = {}
    """``binary_data``: whether it shall follow the JSON of the answer."""


class InferRequest(Shape):
    inputs: Annotated[list[InferInput], Field(min_length=1, json_schema_extra={"maxItems": 1}), FailFast()]
    """One BYTES tensor: texts, or image files in base64 (binary ones as they are)."""
    id: str | None = None
    outputs: Annotated[list[InferOutput], FailFast()] = []
    """Which outputs to send; all when empty."""
    parameters: dict[str, Any] = {}
    """``binary_data_output``: ``binary_data`` of all outputs that do not say themselves."""


def read_infer(body: bytes, model: ModelInfo, json_length: str | None = None) -> tuple[list[Input], InferRequest]:
    """Inputs of a ``/v2`` infer request, and the request itself. ``json_length``: the header of that name (see
    ``binary_tensors``). Raises ApiError 400 or 422."""
    if json_length == "0":
        return _raw_request(body, model)
    try:
        head, following = split_body(body, json_length)
    except ValueError as error:
        raise ApiError(400, "invalid_binary_data", str(error), "leave it out where the body is JSON alone") from None
    request = checked(InferRequest, head, model)
    if len(request.inputs) != 1:
        refuse("inputs", f"must hold the one tensor {model.input_kind!r}, but holds {len(request.inputs)}")
    tensor = request.inputs[0]
    for field, value, expected in (("name", tensor.name, model.input_kind), ("datatype", tensor.datatype, "BYTES")):
        if value != expected:
            refuse(f"inputs[0].{field}", f"must be {expected!r}, but is {shown(value)}")
    for output in request.outputs:
        if output.name not in (LABEL, PROBABILITIES):
            refuse("outputs", f"names {shown(output.name)}, but there are only 'label' and 'probabilities'")
    _are_binary(request, [output.name for output in request.outputs])
    read = _json_tensor if "binary_data_size" not in tensor.parameters and not following else _binary_tensor
    return read(tensor, following, model), request


def _json_tensor(tensor: InferInput, _: bytes, model: ModelInfo) -> list[Input]:
    if tensor.data is None:
        refuse("inputs[0].data", "is required, since inputs[0].parameters.binary_data_size is not given")
    data = list(_flat(tensor.data))
    if math.prod(tensor.shape) != len(data) or min(tensor.shape, default=0) < 1:
        refuse("inputs[0].shape", f"is {shown(tensor.shape)}, but data holds {len(data)} values")
    values = [{"b64": value} for value in data] if model.input_kind == "image" else data
    return read_inputs(values, "inputs[0].data", model)


def _binary_tensor(tensor: InferInput, following: bytes, model: ModelInfo) -> list[Input]:
    size = tensor.parameters.get("binary_data_size")
    if type(size) is not int or size != len(following):
        refuse("inputs[0].parameters.binary_data_size", f"is {shown(size)}, but {len(following)} bytes follow the JSON",
                "say in inference-header-content-length how many bytes are JSON")  # fmt: skip
    if tensor.data is not None:
        refuse("inputs[0].data", "and binary_data_size are both given", "give one of them")
    if min(tensor.shape, default=0) < 1:
        refuse("inputs[0].shape", f"is {shown(tensor.shape)}, but must hold positive numbers")
    count = math.prod(tensor.shape)
    check_count(count, "inputs[0].shape", model)
    try:
        elements = unpack_bytes(following, count)
    except ValueError as error:
        refuse("inputs[0]", f"as binary data {error}", "send 4 bytes of length (little-endian) before each element")
    return [_element(element, f"inputs[0].data[{index}]", model) for index, element in enumerate(elements)]


def _raw_request(body: bytes, model: ModelInfo) -> tuple[list[Input], InferRequest]:
    """The body is one text or one image file. All outputs are answered in binary form, as the extension says."""
    if not body:
        refuse("the body", f"must be one {model.input_kind}, but is empty")
    tensor = InferInput(name=model.input_kind, shape=[1], datatype="BYTES")
    return [_element(body, "the body", model)], InferRequest(inputs=[tensor], parameters={"binary_data_output": True})


def _element(content: bytes, field: str, model: ModelInfo) -> Input:
    if model.input_kind == "image":
        return content
    try:
        return read_text(content.decode(), field, model)
    except UnicodeDecodeError as error:
        refuse(field, f"is not UTF-8 at byte {error.start}")


def infer_answer(
    answers: Answers, model: ModelInfo, request: InferRequest, request_id: str
) -> tuple[dict[str, Any], bytes]:
    """The JSON of a ``/v2`` answer, probabilities flat, row by row; and the tensors that follow it, where they shall.

    Raises ApiError 422 if an input is unreadable.
    """
    refuse_unreadable(answers, "inputs[0].data")
    rows = len(answers.outputs)
    columns = list(answers.outputs[0]["scores"])
    flat = [output["scores"][label] for output in answers.outputs for label in columns]
    tensors = [
        {"name": LABEL, "datatype": "BYTES", "shape": [rows], "data": [output["label"] for output in answers.outputs]},
        {"name": PROBABILITIES, "datatype": "FP32", "shape": [rows, len(columns)], "data": flat},
    ]
    wanted = {output.name for output in request.outputs} or {LABEL, PROBABILITIES}
    chosen = [tensor for tensor in tensors if tensor["name"] in wanted]
    outputs, following = pack_outputs(chosen, _are_binary(request, [str(tensor["name"]) for tensor in chosen]))
    return {
        "model_name": model.model_name,
        "model_version": answers.version,
        "id": request.id or request_id,
        "parameters": {"labels": columns},
        "outputs": outputs,
    }, following


def _are_binary(request: InferRequest, names: Sequence[str]) -> list[bool]:
    """Whether each of these outputs shall follow the JSON of the answer. Raises ApiError 422."""
    for_all = request.parameters.get("binary_data_output", False)
    told = {output.name: output.parameters.get("binary_data", for_all) for output in request.outputs}
    for value in (for_all, *told.values()):
        if not isinstance(value, bool):
            refuse("outputs", f"ask for binary_data with {shown(value)}, which is neither true nor false")
    return [told.get(name, for_all) for name in names]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """Tensors may come flat or nested; iterative, since the client decides how deeply."""
    stack = [iter(values)]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()
