"""What is searched where a recipe leaves the space out."""

import pytest
from pydantic import ValidationError

from orchestrator.compression.presets import FORM, first_points, others_of, usual_space
from orchestrator.recipe_compression import Compression
from orchestrator.recipe_tuning import Dimension

METHODS = {"layers": "", "heads": "", "units": "", "filters": "it has no convolutions", "rank": "", "sparsity": ""}
FORMS = dict.fromkeys(Compression.model_fields["form"].annotation.__args__, "")


def test_only_what_applies_is_searched():
    space = usual_space(METHODS, FORMS, Compression(), 128)
    assert set(space) == {f"compression.{name}" for name in ("layers", "heads", "units", "form")}


def test_a_form_that_is_not_to_be_had_is_left_out():
    without = {name: "not installed" if name.startswith("openvino") else "" for name in FORMS}
    forms = usual_space(METHODS, without, Compression(), 128)["compression.form"].values
    assert forms
    assert not any(form.startswith("openvino") for form in forms)


def test_the_recipes_own_values_are_among_what_is_tried():
    own = Compression(layers=0.75, form="torch-fp32")
    space = usual_space(METHODS, FORMS, own, 128)
    assert 0.75 in space["compression.layers"].values
    assert "torch-fp32" in space["compression.form"].values


def test_texts_are_cut_only_where_there_are_texts_and_enough_of_them():
    asked = "compression.max_tokens"
    assert asked not in usual_space(METHODS, FORMS, Compression(), 128)  # nobody says that it applies
    assert usual_space(METHODS | {"max_tokens": ""}, FORMS, Compression(), 128)[asked].values == (96, None)
    assert asked not in usual_space(METHODS | {"max_tokens": ""}, FORMS, Compression(), 20)


def test_tokens_are_left_out_only_where_that_applies_and_there_are_enough_of_them():
    asked = "compression.tokens"
    assert asked not in usual_space(METHODS, FORMS, Compression(), 128)
    assert usual_space(METHODS | {"tokens": ""}, FORMS, Compression(), 128)[asked].values == (16, None)
    assert usual_space(METHODS | {"tokens": ""}, FORMS, Compression(tokens=20), 128)[asked].values == (16, 20)
    assert asked not in usual_space(METHODS | {"tokens": ""}, FORMS, Compression(), 24)


def test_rounding_in_training_and_leaving_tokens_out_do_not_go_together():
    rounded = {"epochs": 1, "fake_int8": True}
    assert Compression.model_validate({"recovery": rounded}).recovery.fake_int8
    with pytest.raises(ValidationError, match="which read all tokens: leave tokens out"):
        Compression.model_validate({"recovery": rounded, "tokens": 16})


SPACE = {
    "compression.layers": Dimension.model_validate([0.5, 1.0, 0.25, 0.75]),
    "compression.max_tokens": Dimension.model_validate([64, None]),
    "compression.sparsity": Dimension.model_validate([0.9, 0.0]),
    "compression.recovery.epochs": Dimension.model_validate([1, 5]),
    FORM: Dimension.model_validate(["torch-fp32", "onnxruntime-int8", "openvino-int8"]),
}
OWN = {"compression.layers": 1.0, "compression.max_tokens": None, "compression.sparsity": 0.0,
       "compression.recovery.epochs": 5, FORM: "torch-fp32"}  # fmt: skip


def test_the_first_points_are_the_whole_network_in_each_form_and_a_ladder_down_in_the_first_int8():
    points = first_points(SPACE, OWN, 24)
    assert points[:3] == [OWN | {FORM: form} for form in ("onnxruntime-int8", "openvino-int8", "torch-fp32")]
    ladder = points[3:]  # half of two values is the smaller one
    assert {point[FORM] for point in ladder} == {"onnxruntime-int8"}
    assert {point["compression.recovery.epochs"] for point in ladder} == {5}
    assert [point["compression.layers"] for point in ladder] == [1.0, 0.75], "layers go last"
    assert all(p["compression.max_tokens"] is None and p["compression.sparsity"] == 0.9 for p in ladder)


def test_few_candidates_are_not_spent_on_the_whole_network():
    points = first_points(SPACE, OWN, 6)
    assert [point["compression.sparsity"] for point in points] == [0.0, 0.0, 0.9, 0.9]


def test_a_student_is_tried_in_the_forms_that_were_best_for_the_whole_network():
    point, forms = OWN | {FORM: "a"}, ("a", "b", "c", "d")
    assert others_of(point, forms, ["d", "a", "c", "gone"]) == [OWN | {FORM: form} for form in ("d", "c")]
    assert others_of(point, forms, []) == [OWN | {FORM: form} for form in ("b", "c")]
    assert others_of(point, ("a",), ["a"]) == []
    assert others_of(OWN, (), []) == []


def test_ranges_have_no_ladder():
    space = {"compression.layers": Dimension.model_validate({"uniform": [0.5, 1.0]}),
             FORM: Dimension.model_validate(["torch-fp32"])}  # fmt: skip
    own = {"compression.layers": 1.0, FORM: "torch-fp32"}
    assert first_points(space, own, 9) == [own]
    assert first_points(space, None, 9) == []
