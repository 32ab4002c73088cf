"""What is searched where a recipe leaves the space out."""

from orchestrator.compression.presets import usual_space
from orchestrator.recipe_compression import Compression

METHODS = {"layers": "", "heads": "", "units": "", "filters": "it has no convolutions", "rank": "", "sparsity": ""}
FORMS = dict.fromkeys(Compression.model_fields["form"].annotation.__args__, "")


def test_only_what_applies_is_searched():
    space = usual_space(METHODS, FORMS, Compression())
    assert set(space) == {f"compression.{name}" for name in ("layers", "heads", "units", "form")}


def test_a_form_that_is_not_to_be_had_is_left_out():
    without = {name: "not installed" if name.startswith("openvino") else "" for name in FORMS}
    forms = usual_space(METHODS, without, Compression())["compression.form"].values
    assert forms
    assert not any(form.startswith("openvino") for form in forms)


def test_the_recipes_own_values_are_among_what_is_tried():
    own = Compression(layers=0.75, form="torch-fp32")
    space = usual_space(METHODS, FORMS, own)
    assert 0.75 in space["compression.layers"].values
    assert "torch-fp32" in space["compression.form"].values
