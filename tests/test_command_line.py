"""What the command line itself decides: where keys and models are looked for, and what a job is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import submit
from orchestrator.cli import main


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "r.yaml"
    file.write_text(f"name: r\ntask: text_classification\nstorage: {tmp_path}/elsewhere\ndata: {{source: none.csv}}\n")
    return str(file)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
    return capsys.readouterr().out


def test_keys_and_models_are_those_of_the_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = said(capsys, "keys", "create", "shop", "--recipe", recipe)
    assert f", in {tmp_path}/elsewhere: " in made.splitlines()[0]
    number = made.split()[1]
    assert number in said(capsys, "keys", "list", "--recipe", recipe)
    assert "no keys yet in ./runs" in said(capsys, "keys", "list")
    assert f"revoked {number}" in said(capsys, "keys", "revoke", number, "--recipe", recipe)
    said(capsys, "models", "--recipe", recipe)
    assert (tmp_path / "elsewhere" / "registry").is_dir() and not (tmp_path / "runs" / "registry").exists()


def test_what_the_verb_alone_knows_goes_to_the_job(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(submit, "submit_job", lambda *arguments: given.extend(arguments) or 0)
    for verb, *words in (["serve", "--canary", "10%", "--version", "4"], ["ensemble", "--versions", "1,2"]):
        given.clear()
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "submit",
                    verb,
                    recipe,
                    *words,
                    "--address",
                    "http://127.0.0.1:1",
                    "--set",
                    "training.epochs=1",
                    "--json",
                ]
            )
        assert ended.value.code == 0
        assert given == ["http://127.0.0.1:1", verb, [recipe, "--set", "training.epochs=1", *words, "--json"]]
