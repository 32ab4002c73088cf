"""What a user gets wrong, as the user sees it: exit status 2, what is wrong and what to do, and never a traceback."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import main

ROOT = Path(__file__).parent.parent
Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Writes a recipe for a table of these lines, and goes where it lies."""
    monkeypatch.chdir(tmp_path)

    def write(rows: str | bytes | None = None, more: str = "", data: str = "{source: rows.csv}") -> Path:
        if rows is not None:
            (tmp_path / "rows.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"name: mistakes\ntask: text_classification\ndata: {data}\nmodel: {{backbone: {tiny_backbone}}}\n{more}"
        )
        return path

    return write


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    """What the command says when it refuses."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == status, said
    assert "Traceback" not in said
    return said


def lines(count: int, label: Callable[[int], str] = lambda i: "ab"[i % 2]) -> str:
    return "".join(f"the tea number {i} was fine,{label(i)}\n" for i in range(count))


TABLE = "text,label\n" + lines(60)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("training: {epochz: 3}\n", ["recipe.yaml:5:12: training.epochz", "did you mean training.epochs?"]),
        ("trainning: {epochs: 3}\n", ["recipe.yaml:5:1: trainning", "did you mean training?"]),
        ("name: again\n", ["recipe.yaml:5:1: ", "'name' is given twice, first on line 1"]),
        ("training: {epochs: many}\n", ["recipe.yaml:5:12: training.epochs", "many"]),
        ("training: {epochs: 0}\n", ["training.epochs", "0"]),
        ("training: [", ["recipe.yaml:5:12: not valid YAML"]),
    ],
    ids=["misspelt", "unknown section", "duplicate", "type", "range", "yaml"],
)
def test_a_mistake_in_the_recipe_is_shown_where_it_is(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], more: str, words: list[str]
) -> None:
    said = refused(capsys, "prepare", recipe(TABLE, more))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ("{trials: 0}", ["recipe.yaml:5:10: tuning.trials", "greater than or equal to 1"]),
        ("{space: {}}", ["tuning", "space is empty: name fields to search, or leave it out"]),
        ("{space: {training.epochz: [1]}}", ["tuning.space.training.epochz is not a recipe field", "training.epochs"]),
        ("{space: {training.weight_decay: {uniform: [0, 2]}}}", ["tuning.space.training.weight_decay: 2", "cannot be"]),
        ("{space: {training.epochs: {unifrm: [0, 2]}}}", ["needs exactly one of choice, uniform", "unifrm"]),
        ("{objectives: {minimize: macro_f1}}", ["macro_f1 cannot be minimized"]),
        ("{objectives: [loss, seconds], scheduler: asha}", ["compares trials by one objective"]),
        ("{constraints: {size_mb: {}}}", ["needs at_most, at_least or both"]),
    ],
    ids=["budget", "no space", "no field", "range", "kind", "direction", "scheduler", "bound"],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tuning: str, words: list[str]
) -> None:
    said = refused(capsys, "tune", recipe(TABLE, f"tuning: {tuning}\n"))
    assert all(word in said for word in words), said


def test_a_recipe_without_a_search_has_nothing_to_tune(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the recipe has no tuning section: add one: tuning: {trials: 24}" in refused(capsys, "tune", recipe(TABLE))


def test_a_recipe_without_limits_has_nothing_to_compress(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the recipe has no compression section: add one" in refused(capsys, "compress", recipe(TABLE))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ["there is nothing at rows.csv", "relative to the working directory"]),
        ("", ["rows.csv is empty"]),
        ("text,label\n", ["rows.csv has no rows"]),
        (
            ("text,label\n" + lines(60).replace("tea", "thé")).encode("latin-1"),
            ["line 2 has bytes that are not of the file's encoding", "data.encoding", "latin-1"],
        ),
        ("text,label\n" + "a,b,c\n" * 60, ["line 2 has 3 fields", "names 2 columns"]),
        ("text,label\n" + lines(60, lambda i: "same"), ["same"]),
        ('text,label\n"never closed,a\n' + lines(60), ["quote opened on line 2 is never closed"]),
        ("text,text\n" + lines(60), ["'text' appears twice"]),
    ],
    ids=["missing", "empty", "only a header", "encoding", "ragged", "one class", "open quote", "same column"],
)
def test_a_table_that_cannot_train_is_refused_with_the_reason(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], rows: str | bytes | None, words: list[str]
) -> None:
    data = "{source: rows.csv, columns: {text: text, label: label}}"
    said = refused(capsys, "prepare", recipe(rows, data=data))
    assert all(word in said for word in words), said
    assert not list(Path("runs").glob("prepare/mistakes-*")), "nothing half-written is left"


def test_some_ragged_rows_are_set_aside_and_the_rest_goes_on(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    main_ended_well("prepare", recipe(TABLE + "one,two,three\n"))
    assert "1 unreadable" in capsys.readouterr().out
    (quarantine,) = Path("runs").glob("prepare/*/quarantine.jsonl")
    assert '"line": 62' in quarantine.read_text() and "has 3 fields" in quarantine.read_text()


def main_ended_well(*arguments: object) -> None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert not ended.code


def test_a_label_seen_only_in_test_is_refused(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    Path("test.csv").write_text("text,label\n" + lines(20) + "so odd it is,odd\n")
    said = refused(capsys, "prepare", recipe(TABLE, data="{split: {files: {train: rows.csv, test: test.csv}}}"))
    assert "the label 'odd' is in test (1 rows) but not in train" in said


def test_a_column_that_is_not_there_is_named_with_the_nearest(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "prepare", recipe(TABLE, data="{source: rows.csv, columns: {label: lable}}"))
    assert "no column 'lable'; the columns are text, label: did you mean 'label'?" in said


def test_corrupt_images_are_set_aside_and_a_folder_of_nothing_else_is_refused(
    shapes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for label in ("x", "y"):
        (tmp_path / "broken" / label).mkdir(parents=True)
        for number in range(12):
            (tmp_path / "broken" / label / f"{number}.png").write_bytes(b"\x89PNG but not really")
    text = (
        "name: pictures\ntask: image_classification\ndata: {source: %s}\nmodel: {backbone: resnet18, weights: none}\n"
    )
    Path("good.yaml").write_text(text % shapes_folder)
    Path("bad.yaml").write_text(text % "broken")
    main_ended_well("prepare", "good.yaml")
    assert "1 unreadable" in capsys.readouterr().out
    said = refused(capsys, "prepare", "bad.yaml")
    assert "none of the 24 rows can be used: x/0.png" in said


def test_a_backbone_that_is_not_there_offline_says_what_can_be_named(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(TABLE)
    said = refused(capsys, "prepare", path, "--set", "model.backbone=no-such/backbone")
    assert "no-such/backbone" in said and "package:" in said
    said = refused(capsys, "prepare", path, "--set", "model.backbone=./nowhere")
    assert "not a folder with a config.json" in said


def test_more_workers_than_there_are_cores_are_refused(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "check", recipe(TABLE, "training: {workers: 512}\n"))
    assert "training.workers is 512, but the cluster has" in said


def test_a_port_in_use_is_refused_before_anything_starts(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused(capsys, "serve", recipe(TABLE, f"serving: {{port: {port}}}\n"), "--block")
    assert f"cannot listen on 127.0.0.1 port {port}" in said and "--set serving.port=" in said


def test_a_model_that_was_never_made_is_not_served(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "serve", recipe(TABLE), status=1)
    assert "mistakes has no champion" in said
    assert "no model 'mistakes'" in refused(capsys, "models", "mistakes")


def test_a_full_disk_is_said_and_leaves_what_was_there(recipe: Recipe) -> None:
    path = recipe("text,label\n" + lines(3000))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    def run(preexec_fn: Callable[[], None] | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "orchestrator.cli", "prepare", str(path)], preexec_fn=preexec_fn,
                              capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip

    full = run(limit)
    assert (full.returncode, "no room to write" in full.stderr) == (1, True), full.stderr
    assert "Traceback" not in full.stderr
    assert not list(Path("runs").glob("prepare/mistakes-*")) and not list(Path("runs").glob(".staging/*"))
    assert run(None).returncode == 0
