"""What is asked of ``orchestrator ensemble`` is read, and what cannot be is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli import main
from orchestrator.data.text import TextEncoder
from orchestrator.ensemble import EnsembleStage, Group, Wish, _order
from orchestrator.errors import DataError, ModelNotFound, OrchestratorError, UserError
from orchestrator.models.backbones import TransformersNetwork
from orchestrator.models.checkpoint import save_model
from orchestrator.present import describe
from orchestrator.progress import ignore
from orchestrator.recipe import Model
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import VersionRecord
from orchestrator.registry.store import Registry
from orchestrator.storage import Storage


def test_weights_follow_their_versions_and_add_up_to_one() -> None:
    wish = Wish.parse("7,3, 5", "mean", "2,1,1")
    assert (wish.versions, wish.weights, wish.how) == ((3, 5, 7), (0.25, 0.25, 0.5), "given")


def test_the_order_in_which_versions_are_named_does_not_matter() -> None:
    assert Wish.parse("5,3", "vote", "equal") == Wish.parse("3,5", "vote", "equal")


@pytest.mark.parametrize(
    ("versions", "combine", "weights", "told"),
    [
        ("3", "mean", "equal", "at least two members, but --versions is '3'"),
        ("3,x", "mean", "equal", "'x' is not a version"),
        ("", "mean", "equal", "'' is not a version"),
        ("3,3", "mean", "equal", "names version 3 twice"),
        ("3,5", "median", "equal", "--combine 'median' is not known: known are mean, vote"),
        ("3,5", "mean", "best", "--weights 'best' is not known"),
        ("3,5", "mean", "0.5,0.3,0.2", "--weights has 3 numbers for 2 versions"),
        ("3,5", "mean", "1,-1", "weights are at least 0, and not all 0"),
        ("3,5", "mean", "0,0", "weights are at least 0, and not all 0"),
        ("3,5", "mean", "nan,1", "weights are at least 0, and not all 0"),
        ("3,5", "vote", "fitted", "--weights fitted does not go with --combine vote"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(versions: str, combine: str, weights: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        Wish.parse(versions, combine, weights)
    assert told in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------- registered versions


class Registered:
    """A registry of small models, and the stage that joins them."""

    def __init__(self, root: Path, backbone: Path) -> None:
        self.storage, self.backbone = Storage(str(root)), backbone
        self.registry = Registry(self.storage)
        text = f"name: r\ntask: text_classification\nstorage: {root}\ndata: {{source: none.csv}}\n"
        self.stage = EnsembleStage(parse_recipe(text), self.storage, self.registry, self._never, self._never, ignore)

    def _never(self, *arguments: Any) -> Any:
        raise AssertionError("nothing is computed before the versions are checked")

    def add(self, labels: tuple[str, ...], task: str = "text_classification") -> None:
        torch.manual_seed(0)
        network = TransformersNetwork.create(Model(weights="none"), str(self.backbone), labels)
        made = f"made/{len(self.registry.versions('r'))}"
        with self.storage.publish(made) as folder:
            save_model(folder, network, TextEncoder(self.backbone, 32), labels, task)
        draft = VersionRecord(
            name="r", version=0, location="", model=made, dataset="", evaluation="", metrics={}, code_version="",
            created_at="", manifest_sha256="",
        )  # fmt: skip
        self.registry.register(draft, {"model": self.storage.fetch(made)})

    def group(self, versions: str = "1,2") -> Group:
        return self.stage.group(Wish.parse(versions, "mean", "equal"))


@pytest.fixture
def registered(tmp_path: Path, tiny_backbone: Path) -> Registered:
    made = Registered(tmp_path, tiny_backbone)
    made.add(("bad", "good"))
    return made


def refused(registered: Registered, kind: type[OrchestratorError] = UserError) -> str:
    with pytest.raises(kind) as error:
        registered.group()
    assert error.value.exit_status == 2 and "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_version_is_refused(registered: Registered) -> None:
    assert refused(registered, ModelNotFound) == "r has no version or alias 2: its versions are 1"


def test_other_labels_are_refused(registered: Registered) -> None:
    registered.add(("bad", "good", "so so"))
    assert "version 1 tells bad, good apart, and version 2 bad, good, so so: join versions" in refused(registered)


def test_another_task_is_refused(registered: Registered) -> None:
    registered.add(("bad", "good"), "image_classification")
    assert "version 2 does image_classification, and the recipe is for text_classification" in refused(registered)


def test_a_member_that_was_changed_on_the_disk_is_noticed(registered: Registered) -> None:
    registered.add(("bad", "good"))
    (file,) = registered.storage.path("registry/models/r").glob("2-*/model/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(OrchestratorError, match="is not the file that was written"):
        registered.group()


def test_labels_in_another_order_are_no_other_labels(registered: Registered) -> None:
    registered.add(("good", "bad"))
    group = registered.group()
    assert [_order(("bad", "good"), member) for member in group.members] == [(0, 1), (1, 0)]
    assert group.encoding[1] == (0, 0), "they share one encoder"


def test_data_with_other_labels_than_the_members_are_refused(registered: Registered) -> None:
    registered.add(("bad", "good"))
    with pytest.raises(DataError, match=r"the recipe's data have the labels a, b, the versions tell bad, good apart"):
        _order(("a", "b"), registered.group().members[0])


def test_the_command_line_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\ntask: text_classification\nstorage: {tmp_path}/runs\ndata: {{source: none.csv}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["ensemble", str(recipe), "--versions", "1,2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: there is no model 'r': known are: none yet"


# ---------------------------------------------------------------------------------------------------------- printing


def printed(metric: str, is_better: bool) -> str:
    score = {"loss": 0.4, "accuracy": 0.8, "macro_f1": 0.75, "weighted_f1": 0.8}
    members = [
        {"version": n, "model": "", "backbone": "b", "weight": w, "validation": score} for n, w in ((1, 0.9), (4, 0.1))
    ]
    apart = {"labels": 0.1, "predictive_entropy": 0.5, "member_entropy": 0.4, "mutual_information": 0.1}
    mixture = {
        "members": members,
        "combine": "mean",
        "weights": "fitted",
        "validation": score | {"loss": 0.3},
        "disagreement": apart,
    }
    model = {"best_metric": metric, "parameters": 2e6, "size_bytes": 5e6, "mixture": mixture}
    return describe({"stage": "ensemble", "rows": 40, "best": 4, "is_better": is_better, "model": model})


def test_the_record_says_the_weights_and_what_each_scores() -> None:
    lines = [line.strip() for line in printed("macro_f1", True).splitlines()]
    assert "weights fitted on 40 validation rows" in lines[0]
    assert lines[1] == "version 1  weight 0.900, validation macro_f1 0.7500, loss 0.4000"
    assert lines[3].endswith("loss 0.3000; better than its best member, version 4 (macro_f1 0.7500)")


def test_the_record_says_where_joining_was_of_no_use() -> None:
    assert "; not better than its best member, version 4 (loss 0.4000)" in printed("loss", False)
    assert "validation loss 0.3000;" in printed("loss", False)
