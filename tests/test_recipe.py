"""The recipe answers each mistake with the line, the column and the nearest known key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import load_recipe, parse_recipe, to_yaml

GOOD = "name: reviews\ntask: text_classification\ndata: {source: reviews.csv}\n"


def test_every_field_but_three_has_a_default() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.training.epochs == 3
    assert recipe.storage == "./runs"


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    recipe = parse_recipe(
        GOOD, overrides=["training.class_weights={a: 2}", "training.early_stopping.patience_epochs=3"]
    )
    assert parse_recipe(to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "training:\n  epoch: 3\n", r"recipe:5:3: training.epoch is not a recipe field: did you mean training.epochs"),
        (GOOD + "epochs: 3\n", r"recipe:4:1: epochs is not a recipe field: did you mean training.epochs"),
        (GOOD + "name: again\n", r"recipe:4:1: the key 'name' is given twice, first on line 1"),
        ("name: x\n", r"task is required"),
        (GOOD + "training: {batch_size: 0}\n", r"recipe:4:12: training.batch_size: .*greater than or equal to 1.*got 0"),
        (GOOD + "training: {batch_size: many}\n", r"training.batch_size: .*valid integer.*got 'many'"),
        (GOOD.replace("reviews\n", "../reviews\n", 1), r"name must be lower-case letters"),
        (GOOD + "data: {source: [\n", r"recipe:\d+:\d+: not valid YAML"),
        (GOOD.replace("text_classification", "texts"), r"task: .*'text_classification' or 'image_classification'"),
        ("- a\n- b\n", r"must be a mapping"),
        ("", r"must be a mapping"),
        (GOOD + "data2: !!python/object/apply:os.system [true]\n", r"data2"),
        (GOOD.replace("source: reviews.csv", ""), r"exactly one of source and split.files"),
        (GOOD.replace("reviews.csv", "a.csv, split: {train: 0.9}"), r"must sum to 1"),
        (GOOD + "training: {mixup: 0.2}\n", r"mixup blends pixels.*remove it, or use label_smoothing"),
        (GOOD.replace("text_", "image_") + "training: {lora: {}}\n", r"lora adapts text backbones alone"),
        (GOOD + "training: {layer_decay: 0}\n", r"training.layer_decay: .*greater than 0.*got 0"),
        (GOOD + "training: {averaging: {kind: mean}}\n", r"training.averaging.kind: .*'ema' or 'swa'"),
        (GOOD + "serving: {min_replicas: 5}\n", r"min_replicas \(5\) must not exceed max_replicas"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_where_it_stands(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD + "training: {epoch: 1, batch_sise: 2}\n")
    assert "training.epochs" in str(caught.value)
    assert "training.batch_size" in str(caught.value)


def test_an_alias_bomb_is_refused_in_bounded_memory() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    with pytest.raises(RecipeError, match="too many values"):
        parse_recipe(bomb)


def test_a_tag_that_would_run_code_does_not(tmp_path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(RecipeError):
        parse_recipe(f"name: !!python/object/apply:pathlib.Path.touch [{canary}]\n")
    assert not canary.exists()


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert parse_recipe(GOOD + "training: {learning_rate: 1e-4}\n").training.learning_rate == 1e-4


def test_set_overrides_any_field_by_its_path() -> None:
    recipe = parse_recipe(GOOD, overrides=["training.epochs=7", "data.split.by.group=customer"], storage="/elsewhere")
    assert (recipe.training.epochs, recipe.data.split.by.group, recipe.storage) == (7, "customer", "/elsewhere")


def test_set_reaches_into_a_section_that_is_off_by_default() -> None:
    recipe = parse_recipe(GOOD, overrides=["training.averaging.kind=swa", "training.lora.rank=4"])
    assert (recipe.training.averaging.kind, recipe.training.averaging.start_fraction) == ("swa", 0.75)
    assert (recipe.training.lora.rank, recipe.training.lora.alpha) == (4, 16.0)


def test_set_of_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean training.epochs"):
        parse_recipe(GOOD, overrides=["training.epoch=1"])
    with pytest.raises(RecipeError, match="PATH=VALUE"):
        parse_recipe(GOOD, overrides=["training.epochs"])


def test_a_missing_file_says_how_to_get_one(tmp_path) -> None:
    with pytest.raises(RecipeError, match="orchestrator init"):
        load_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(binary)


@given(st.text(max_size=200))
def test_any_text_gives_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        assert isinstance(parse_recipe(text), Recipe)
    except RecipeError:
        pass
