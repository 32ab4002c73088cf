"""A student learns what its teacher answers: the formulas, how layers pair, and runs that stop, start elsewhere or lack a
teacher."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from knobs import ALONE, changed, image_job, text_job, trained, trained_by_two, weights, weights_file
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from orchestrator.compression.survey import SurveyJob, ask_teacher
from orchestrator.data.text import TextEncoder
from orchestrator.errors import DataError, RecipeError
from orchestrator.models import post_norm
from orchestrator.models.backbones import EnsembleNetwork, Network, TorchvisionNetwork, TransformersNetwork, Watched
from orchestrator.models.checkpoint import load_model, save_model
from orchestrator.progress import ignore
from orchestrator.recipe import Distillation, Model, Training
from orchestrator.records import DatasetRecord, ModelRecord
from orchestrator.storage import ANSWERS, METRICS, RECORD, Storage, sha256_file
from orchestrator.training.distillation import Teacher, answer_losses, hidden_losses, layer_pairs
from orchestrator.training.here import Here
from orchestrator.training.loop import Compute, MicroBatch, train_step
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.placement import Placement
from orchestrator.training.stage import TrainStage
from orchestrator.training.worker import TrainJob, train_worker

CPU = Compute(torch.device("cpu"), "fp32")
LABELS = ("a", "b")
NONE = torch.empty(0)


def hidden(
    student: list[torch.Tensor], teacher: list[torch.Tensor], real: torch.Tensor | None = None
) -> torch.Tensor | None:
    return hidden_losses(Watched(NONE, student), Watched(NONE, teacher), real)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def texts(tiny_backbone: Path, seed: int) -> TransformersNetwork:
    torch.manual_seed(seed)
    network = TransformersNetwork.create(Model(dropout=0.0), str(tiny_backbone), LABELS).train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def rows() -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 6, 3, 9])[:, None]).long()
    ids = torch.randint(4, 40, (4, 9), generator=generator) * mask
    return MicroBatch(
        {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 2, 0.5, 1])
    )


def split(whole: MicroBatch, sizes: list[int]) -> list[MicroBatch]:
    dealt = zip(*(x.split(sizes) for x in whole.inputs.values()), strict=True)
    inputs = [dict(zip(whole.inputs, values, strict=True)) for values in dealt]
    return [
        MicroBatch(*part) for part in zip(inputs, whole.labels.split(sizes), whole.weights.split(sizes), strict=True)
    ]


def taught(student: Network, teacher: Teacher, parts: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    still = torch.optim.SGD(student.parameters(), lr=0.0)
    total = float(sum(part.weights.sum() for part in parts))
    loss, _ = train_step(teacher.watching(student), parts, still, losses, CPU, total_weight=total, max_grad_norm=None,
                         teach=teacher.teach)  # fmt: skip
    return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------- the formulas


def test_of_its_own_copy_a_student_has_nothing_to_learn(tiny_backbone: Path) -> None:
    student = texts(tiny_backbone, 0)
    teacher = Teacher(copy.deepcopy(student), Distillation(weight=1.0, temperature=3.0, hidden=1.0))
    loss, gradients = taught(student, teacher, [rows()])
    assert abs(loss) < 1e-6 and max(gradient.abs().max() for gradient in gradients.values()) < 1e-5
    other, _ = taught(texts(tiny_backbone, 1), teacher, [rows()])
    assert other > 0.1


def test_the_loss_is_the_weighted_mean_of_what_label_and_teacher_say(tiny_backbone: Path) -> None:
    student, network, batch = texts(tiny_backbone, 0), texts(tiny_backbone, 1), rows()
    teacher = Teacher(network, Distillation(weight=0.3, temperature=4.0))
    ours, theirs = student(**batch.inputs), network(**batch.inputs)
    p, q = ((x / 4.0).softmax(-1) for x in (theirs, ours))
    each = 0.7 * losses(ours, batch.labels) + 0.3 * 16.0 * (p * (p.log() - q.log())).sum(-1)
    expected = (each * batch.weights).sum() / batch.weights.sum()
    assert taught(student, teacher, [batch])[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_is_left_as_it_is(tiny_backbone: Path) -> None:
    network = texts(tiny_backbone, 1)
    before = copy.deepcopy(network.state_dict())
    taught(texts(tiny_backbone, 0), Teacher(network, Distillation(hidden=1.0)), [rows()])
    assert not network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_gradients_do_not_depend_on_the_parts_of_a_step(tiny_backbone: Path) -> None:
    teacher = Teacher(texts(tiny_backbone, 1), Distillation(hidden=0.5))
    found = [taught(texts(tiny_backbone, 0), teacher, parts) for parts in ([rows()], split(rows(), [1, 2, 1]))]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_square_of_the_temperature_keeps_the_size_of_gradients() -> None:
    torch.manual_seed(0)
    teacher, norms = torch.randn(50, 4), []
    for temperature in (5.0, 20.0):
        student = torch.zeros(50, 4, requires_grad=True)
        answer_losses(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm())
    assert norms[0] / norms[1] == pytest.approx(1.0, abs=0.2)


# ------------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize(("student", "teacher", "pairs"), [
    (6, 6, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]), (3, 6, [(0, 1), (1, 3), (2, 5)]),
    (2, 3, [(0, 1), (1, 2)]), (6, 2, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]), (1, 12, [(0, 11)]),
    (2, 0, []), (0, 2, []),
])  # fmt: skip
def test_each_layer_has_its_counterpart(student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert layer_pairs(student, teacher) == pairs


def test_states_of_one_shape_are_compared_on_real_tokens_in_the_teachers_measure() -> None:
    torch.manual_seed(0)
    ours, theirs, real = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5])
    found = hidden([ours], [theirs], real)
    expected = ((ours[1, :2] - theirs[1, :2]) ** 2).mean() / (theirs[1, :2] ** 2).mean()
    assert found is not None
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(hidden([7 * ours], [7 * theirs], real), found)
    ours[1, 2:] = 100.0
    torch.testing.assert_close(hidden([ours], [theirs], real), found)


def test_a_last_layer_of_the_first_token_alone_is_compared_there() -> None:
    torch.manual_seed(0)
    ours, theirs, real = torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.ones(2, 5)
    torch.testing.assert_close(hidden([ours], [theirs], real), hidden([ours[:, :1]], [theirs], real))


def test_other_numbers_of_channels_are_compared_by_where_they_look() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4)
    maps = [functional.normalize((x**2).mean(1).flatten(1), dim=1) for x in (ours, theirs)]
    torch.testing.assert_close(hidden([ours], [theirs]), ((maps[0] - maps[1]) ** 2).sum(1))
    copies = torch.cat([ours, -ours], 1)  # more channels that look where the others do
    assert hidden([ours], [copies]).abs().max() < 1e-6
    assert hidden([ours], [torch.randn(2, 8, 2, 2)]).shape == (2,)


def test_the_loss_is_the_mean_over_the_layers_and_none_where_nothing_compares() -> None:
    torch.manual_seed(0)
    ours, theirs = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(4)]
    each = [hidden([one], [other]) for one, other in ((ours[0], theirs[1]), (ours[1], theirs[3]))]
    torch.testing.assert_close(hidden(ours, theirs), torch.stack(each).mean(0))
    assert hidden(ours, []) is None
    assert hidden(ours, [torch.randn(2, 3, 4, 4)]) is None


def test_tokens_that_a_student_left_out_are_not_compared() -> None:
    torch.manual_seed(0)
    theirs, real = torch.randn(2, 6, 4), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    places = torch.tensor([[0, 5, 2], [0, 2, 4]])  # the last of the second row is padding
    ours = theirs.gather(1, places[:, :, None].expand(-1, -1, 4)).clone()
    ours[1, 2] = 7.0
    student = Watched(NONE, [ours], [places])
    assert hidden_losses(student, Watched(NONE, [theirs]), real).abs().max() == 0
    ours[0, 1] += 1.0
    losses = hidden_losses(student, Watched(NONE, [theirs]), real)
    torch.testing.assert_close(losses, torch.tensor([4.0 / float((theirs[0, [0, 5, 2]] ** 2).sum()), 0.0]))
    first = hidden_losses(student, Watched(NONE, [theirs, theirs[:, :3]], [torch.arange(6).expand(2, 6), places]), real)
    assert first[0] != losses[0], "of a teacher that left out others, the first token alone is compared"


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_of_altered_texts_the_teacher_alone_says_what_they_are(tiny_backbone: Path, hidden: float) -> None:
    student, network, batch = texts(tiny_backbone, 0), texts(tiny_backbone, 1), rows()
    asked: list[torch.Tensor] = []
    before = batch.inputs["input_ids"].clone()
    network.register_forward_pre_hook(lambda _, __, inputs: asked.append(inputs["input_ids"]), with_kwargs=True)
    settings = Distillation(weight=0.5, hidden=hidden, altered=1.0)
    teacher = Teacher(network, settings)
    torch.manual_seed(0)
    _, losses = teacher.teach(teacher.watching(student), batch, lambda logits, labels: torch.full((len(labels),), 1e6))
    altered = losses(torch.zeros(len(batch.labels), 2), batch.labels) < 1e5
    assert bool(altered.any())
    if not hidden:
        assert torch.equal((asked[0] != batch.inputs["input_ids"]).any(1), altered)
    assert torch.equal(batch.inputs["input_ids"], before), "the batch itself stays"
    teacher.teach(
        teacher.watching(student), batch, lambda logits, labels: logits.sum(1)
    )  # as an adversary's second pass
    teacher.teach(teacher.watching(student), replace(batch), lambda logits, labels: logits.sum(1))
    assert hidden or (torch.equal(asked[1], asked[0]) and not torch.equal(asked[2], asked[0]))


def test_a_teacher_that_does_not_tell_is_said_once_and_costs_nothing(tiny_backbone: Path) -> None:
    told: list[str] = []
    ensemble = EnsembleNetwork([texts(tiny_backbone, 1), texts(tiny_backbone, 2)])
    with_hidden = Teacher(ensemble, Distillation(hidden=1.0), told.append)
    student = texts(tiny_backbone, 0)
    found = [taught(student, teacher, [rows()])[0] for teacher in (with_hidden, Teacher(ensemble, Distillation()))]
    assert found[0] == found[1]
    taught(student, with_hidden, [rows()])
    assert len(told) == 1 and "training.distillation.hidden has no effect" in told[0]


# ------------------------------------------------------------------------------------------------------- what is seen


def test_the_fast_path_tells_the_states_that_the_library_tells(tiny_backbone: Path) -> None:
    network, inputs = texts(tiny_backbone, 0).eval(), rows().inputs
    assert post_norm.is_supported(network.model)
    with torch.no_grad():
        logits, states, _ = network.watched(**inputs)
        theirs = network.model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-5)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(states[0][real], theirs.hidden_states[1][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1], theirs.hidden_states[2][:, :1], rtol=1e-4, atol=1e-5)
    assert len(states) == 2
    network.model.gradient_checkpointing_enable()  # which is left to the library
    assert [tuple(state.shape) for state in network.watched(**inputs)[1]] == [(4, 9, 32)] * 2


@pytest.mark.parametrize(("architecture", "stages"), [("resnet18", 4), ("mobilenet_v3_small", 13), ("efficientnet_b0", 9),
                                                      ("shufflenet_v2_x0_5", 5)])  # fmt: skip
def test_stages_of_convolutional_networks_are_seen(architecture: str, stages: int) -> None:
    torch.manual_seed(0)
    network = TorchvisionNetwork.create(Model(weights="none"), architecture, LABELS).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, states, _ = network.watched(pixels=pixels)
        torch.testing.assert_close(logits, network(pixels=pixels), rtol=0, atol=0)
    assert len(states) == stages and all(state.ndim == 4 for state in states)
    assert not any(module._forward_hooks for module in network.modules()), "nothing is left of it"


def test_layers_of_a_vision_transformer_are_seen() -> None:
    from torchvision.models import VisionTransformer

    network = TorchvisionNetwork(VisionTransformer(32, 16, 3, 2, 8, 16), "vit_b_16", 2, 0.0)
    states = network.watched(pixels=torch.randn(2, 3, 32, 32))[1]
    assert [tuple(state.shape) for state in states] == [(2, 5, 8)] * 3


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def text(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """``train/r`` is trained, and is the teacher."""
    job = text_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("text"))
    trained(job)
    return replace(job, teacher="train/r/model")


@pytest.fixture(scope="module")
def images(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    job = image_job(shapes_folder, tmp_path_factory.mktemp("images"), "shufflenet_v2_x0_5")
    trained(job)
    return replace(job, teacher="train/r/model")


TEXT = {
    "answers": {"distillation": {}},
    "states": {"distillation": {"hidden": 1.0}},
    "altered": {"distillation": {"hidden": 1.0, "altered": 0.75}, "adversarial": 0.5},
    "bf16": {"distillation": {"hidden": 1.0}, "precision": "bf16"},
    "library": {"distillation": {"hidden": 1.0}, "gradient_checkpointing": True, "averaging": {"decay": 0.9}},
    "adversary": {"distillation": {"hidden": 1.0}, "adversarial": 0.5},
}
IMAGES = {
    "states": {"distillation": {"hidden": 1.0}, "mixup": 0.4, "class_weights": "balanced"},
    "checkpointing": {"distillation": {"hidden": 1.0}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("knob", TEXT)
def test_a_stopped_student_of_texts_ends_in_the_same_weights(text: TrainJob, knob: str, at_every_step: None) -> None:
    runs = [changed(text, f"{knob}-{name}", TEXT[knob]) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(2, 8))
    alone = changed(text, f"{knob}-alone", TEXT[knob] | {"distillation": None})
    assert trained(runs[0])[0] != trained(alone)[0], "the teacher changes the weights"


@pytest.mark.parametrize("knob", IMAGES)
def test_a_stopped_student_of_images_ends_in_the_same_weights(images: TrainJob, knob: str, at_every_step: None) -> None:
    runs = [changed(images, f"{knob}-{name}", IMAGES[knob]) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(1, 3))


def test_two_workers_learn_what_one_does(text: TrainJob, tmp_path: Path) -> None:
    training = {"distillation": {"hidden": 1.0}, "epochs": 1}
    one, two = (changed(text, f"workers-{name}", training, {"dropout": 0.0}) for name in ("one", "two"))
    trained(one)
    trained_by_two(two, tmp_path / "meeting")
    ours, theirs = weights(one), weights(two)
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).abs()
    assert difference.max() < 5e-3 and difference.mean() < 2e-6


def test_a_run_begins_with_the_started_networks_weights(text: TrainJob) -> None:
    slow = {"learning_rate": 1e-12, "epochs": 1}
    started, fresh = changed(replace(text, start="train/r/model"), "started", slow), changed(text, "fresh", slow)
    trained(started)
    trained(fresh)
    begun, as_new, first = weights(started), weights(fresh), weights(text)
    for name, tensor in first.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-9)
    assert not torch.allclose(as_new["classifier.weight"], first["classifier.weight"], atol=1e-3)


def test_answers_that_are_known_teach_as_the_teacher_does(text: TrainJob) -> None:
    storage = Storage(text.recipe.storage)
    job = SurveyJob(
        storage.url, "train/r/model", text.dataset, calibration_rows=8, predict_batch=7, serving_batch=1, threads=1,
        cpus=1, seed=text.recipe.seed,
    )  # fmt: skip
    ask_teacher(job, "train/answers")
    training = {"distillation": {"temperature": 3.0}, "epochs": 1}
    asked, known = (changed(text, f"{name}-answers", training) for name in ("asked", "known"))
    known = replace(known, answers="train/answers")
    trained(asked)
    trained(known)
    ours, theirs = weights(asked), weights(known)
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).abs()
    assert difference.max() < 5e-3 and difference.mean() < 2e-6  # other sums, another order
    inverted = -np.load(storage.fetch("train/answers") / ANSWERS)
    with storage.publish("train/inverted") as folder:
        np.save(folder / ANSWERS, inverted)
    misled = replace(changed(text, "misled", training), answers="train/inverted")
    trained(misled)
    difference = torch.cat([(ours[n] - tensor).flatten() for n, tensor in weights(misled).items()]).abs()
    assert difference.mean() > 1e-4, "it learns from them"


def test_a_started_network_that_cuts_texts_goes_on_cutting_them(text: TrainJob) -> None:
    storage = Storage(text.recipe.storage)
    model = load_model(storage.fetch("train/r/model"))
    assert isinstance(model.encoder, TextEncoder)
    with storage.publish("train/short") as folder:
        save_model(folder, model.network, model.encoder.shortened(6), model.labels, model.task)
    job = replace(changed(text, "from-short", {"epochs": 1}), start="train/short")
    trained(job)
    encoder = load_model(storage.fetch("train/from-short/model")).encoder
    assert encoder.describe()["max_tokens"] == 6
    whole = replace(changed(text, "from-long", {"epochs": 1}), start="train/r/model")
    assert trained(whole)[0] != sha256_file(weights_file(job))
    with pytest.raises(DataError, match=r"reads other inputs than this dataset holds: max_tokens 64 instead of 32"):
        with storage.publish("train/long") as folder:
            save_model(folder, model.network, TextEncoder(model.encoder.folder, 64), model.labels, model.task)
        trained(replace(changed(text, "too-long", {"epochs": 1}), start="train/long"))


def test_a_started_student_that_stops_goes_on(text: TrainJob, at_every_step: None) -> None:
    training = {"distillation": {"hidden": 1.0}, "freeze": ("bert.embeddings.*",)}
    runs = [changed(replace(text, start="train/r/model"), f"started-{name}", training) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(4,))


# ------------------------------------------------------------------------------------------------- what does not go


def test_without_a_teacher_the_run_says_what_gives_one(text: TrainJob) -> None:
    with pytest.raises(RecipeError, match=r"distillation needs a teacher.*orchestrator compress gives"):
        train_worker(replace(changed(text, "none", TEXT["answers"]), teacher=None), ALONE, lambda event: None)


def test_a_model_of_other_labels_or_inputs_is_refused(text: TrainJob, images: TrainJob) -> None:
    with pytest.raises(DataError, match=r"the labels of train/r/model are bad, good, but the dataset's good, bad"):
        train_worker(
            replace(changed(text, "labels", TEXT["answers"]), labels=("good", "bad")), ALONE, lambda event: None
        )
    recipe = images.recipe.model_copy(update={"storage": text.recipe.storage})
    other = replace(images, recipe=recipe, labels=text.labels, run="train/inputs", start="train/r/model")
    with pytest.raises(DataError, match=r"train/r/model reads other inputs than this dataset holds: kind text"):
        train_worker(replace(other, dataset=images_in(text, images)), ALONE, lambda event: None)


def images_in(text: TrainJob, images: TrainJob) -> str:
    """The images' dataset in the storage of the texts."""
    place = Path(text.recipe.storage) / images.dataset
    shutil.copytree(Path(images.recipe.storage) / images.dataset, place, dirs_exist_ok=True)
    return images.dataset


@pytest.mark.parametrize(("training", "given", "message"), [
    ({"distillation": {}}, {"start": "train/r/model"}, "distillation needs a teacher"),
    ({"folds": 3}, {"start": "train/r/model"}, "folds does not go with a network that has seen the rows it is validated on"),
    ({"privacy": {"delta": 1e-4}}, {"start": "train/r/model"}, "privacy does not go with a network .* it is trained on"),
])  # fmt: skip
def test_the_stage_refuses_it_before_there_are_workers(
    text: TrainJob, training: dict[str, object], given: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train_by_stage(changed(text, "stage", training), "refused", **given)


def test_the_stages_jobs_have_start_and_teacher(text: TrainJob) -> None:
    job = changed(text, "handed", {"distillation": {}, "epochs": 1})
    model = train_by_stage(job, "handed", start="train/r/model", teacher="train/r/model")
    assert model.parameters == sum(tensor.numel() for tensor in weights(text).values())
    assert model.epochs[0].train_loss < trained_loss(text), "what starts as its teacher's copy is near it"


def train_by_stage(job: TrainJob, key: str, **given: str) -> ModelRecord:
    storage = Storage(job.recipe.storage)
    dataset = DatasetRecord.model_validate(storage.read_json(f"{job.dataset}/{RECORD}"))
    engine = Here(Placement(1, "cpu", 1.0), ignore)
    return TrainStage(job.recipe, storage, engine, ignore, lambda _: np.empty(0), **given).train(dataset, key)


def trained_loss(job: TrainJob) -> float:
    lines = read_metrics(Storage(job.recipe.storage).path(f"{job.run}/{METRICS}"))
    return next(line["train_loss"] for line in lines if line["kind"] == "validation")


@pytest.mark.parametrize(("training", "message"), [
    ({"distillation": {}, "folds": 3}, "distillation does not go with folds, since the teacher has seen"),
    ({"distillation": {}, "privacy": {}}, "privacy does not go with distillation"),
    ({"fake_int8": True, "privacy": {}}, "privacy does not go with fake_int8"),
    ({"distillation": {}, "strategy": "fsdp"}, "distillation and fake_int8 need the whole weights"),
    ({"fake_int8": True, "strategy": "fsdp"}, "distillation and fake_int8 need the whole weights"),
    ({"fake_int8": True, "lora": {}}, "fake_int8 does not go with lora"),
    ({"distillation": {"weight": 1.5}}, "less than or equal to 1"),
    ({"distillation": {"temperature": 0.5}}, "greater than or equal to 1"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(training: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Training.model_validate(training)
