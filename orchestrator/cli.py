"""The command line: parses, calls the pipeline, prints its record. Imports nothing heavy before it has parsed.

Standard output carries results only (``--json``: one JSON object on its last line); progress and errors go to standard
error. Exit status: 0 done, 1 failed, 2 the user's input was wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import OrchestratorError, UserError

if TYPE_CHECKING:
    from orchestrator.pipeline import Pipeline
    from orchestrator.records import Record

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="From a table of texts or a folder of images to a model behind an HTTP endpoint, on Ray, from one recipe.",
)  # fmt: skip

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a recipe field.")]
StorageRoot = Annotated[str | None, typer.Option("--storage", metavar="URL", help="Where results live.")]
Address = Annotated[str | None, typer.Option("--address", metavar="HOST:PORT", help="A running Ray cluster.")]
StorageOf = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="Take the storage from this recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON on the last line.")]
VERBS = ("prepare", "tune", "train", "compress", "ensemble", "evaluate", "promote", "serve", "run")


def main(arguments: list[str] | None = None) -> None:
    """The ``orchestrator`` command. The user's own mistakes never show a traceback."""
    for number in _STOPPED:
        signal.signal(number, _stop)
    try:
        app(arguments)
    except OrchestratorError as error:
        sys.exit(_complain(str(error), error.exit_status))
    except Stopped as stopped:
        word = _STOPPED[stopped.number]
        sys.exit(_complain(f"{word}; the same command goes on from here", 128 + stopped.number))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


_STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal, as an exception: what was begun is ended properly on the way out. No KeyboardInterrupt: typer would answer
    that without a word."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number))


def _complain(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return status


def run_verb(
    verb: str, recipe_path: str, overrides: list[str] | None, storage: str | None, address: str | None, as_json: bool,
    act: Callable[[Pipeline], Record | dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Load the recipe, walk the path up to ``verb``, print its record."""
    from orchestrator.recipe_file import load_recipe

    recipe = load_recipe(recipe_path, overrides or (), storage)
    from orchestrator.pipeline import Pipeline
    from orchestrator.progress import display

    with display() as report, Pipeline(recipe, address=address, report=report) as pipeline:
        record = act(pipeline) if act else pipeline.walk(verb)
    _print_record(record, as_json, pipeline.storage.place)


def _print_record(record: Record | dict[str, Any], as_json: bool, place: Callable[[str], str]) -> None:
    values = record if isinstance(record, dict) else record.model_dump(mode="json")
    if as_json:
        _out(json.dumps(values, ensure_ascii=False))
    else:
        from orchestrator.present import describe

        _out(describe(values, place))


def _out(text: str) -> None:
    print(text, flush=True)  # noqa: T201


@app.command()
def prepare(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
            json_: AsJson = False) -> None:  # fmt: skip
    """Read, clean, split and encode the data, once."""
    run_verb("prepare", recipe, set_, storage, address, json_)


@app.command()
def train(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
          json_: AsJson = False) -> None:  # fmt: skip
    """Fine-tune the backbone on all workers; goes on from the last checkpoint after a stop."""
    run_verb("train", recipe, set_, storage, address, json_)


@app.command()
def tune(
    recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
    json_: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take, as check does.")] = False,
) -> None:  # fmt: skip
    """Search for better values of recipe fields; goes on with the study after a stop, and the winner is the model."""
    if dry_run:
        from orchestrator.check import plan_run

        run_verb("check", recipe, set_, storage, None, json_, plan_run)
    else:
        run_verb("tune", recipe, set_, storage, address, json_)


@app.command()
def compress(
    recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
    json_: AsJson = False,
    version: Annotated[int | None, typer.Option(help="Compress this version, and register what comes of it.")] = None,
) -> None:  # fmt: skip
    """Make the trained model smaller and faster within the recipe's limits; goes on with the sweep after a stop."""
    act = None if version is None else lambda pipeline: pipeline.compress_version(version)
    run_verb("compress", recipe, set_, storage, address, json_, act)


@app.command()
def ensemble(
    recipe: RecipePath,
    versions: Annotated[str, typer.Option(metavar="N,N,...", help="Registered versions of the recipe's model.")],
    combine: Annotated[str, typer.Option(metavar="mean|vote", help="Of their probabilities or labels.")] = "mean",
    weights: Annotated[str, typer.Option(metavar="equal|fitted|W,W,...", help="fitted: those under which the labels of the "
        "validation rows are most likely.")] = "equal",
    set_: Overrides = None, storage: StorageRoot = None, address: Address = None, json_: AsJson = False,
) -> None:  # fmt: skip
    """Join versions to one that answers by their weighted mean or vote; evaluate, register and, if better, promote it."""
    run_verb(
        "ensemble", recipe, set_, storage, address, json_, lambda line: line.join_versions(versions, combine, weights)
    )


@app.command()
def evaluate(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
             json_: AsJson = False) -> None:  # fmt: skip
    """Score the model on the test rows and write the report."""
    run_verb("evaluate", recipe, set_, storage, address, json_)


@app.command()
def promote(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
            json_: AsJson = False) -> None:  # fmt: skip
    """Register the model as a version; make it champion if it is better than the present one."""
    run_verb("promote", recipe, set_, storage, address, json_)


@app.command()
def run(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
        json_: AsJson = False) -> None:  # fmt: skip
    """The whole path, to an answering endpoint; finished stages are skipped when nothing they read has changed."""
    run_verb("run", recipe, set_, storage, address, json_)


@app.command()
def serve(
    recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, address: Address = None,
    json_: AsJson = False,
    version: Annotated[int | None, typer.Option(help="Serve this version instead of the champion.")] = None,
    canary: Annotated[str | None, typer.Option(metavar="SHARE", help="Put --version, or a newer challenger or the "
        "champion, beside the one that answers, and have it answer this share of the requests, such as 10%.")] = None,
    shadow: Annotated[str | None, typer.Option(metavar="SHARE", help="The same, but it answers nobody: it is asked as "
        "well, and compared.")] = None,
    ab: Annotated[str | None, typer.Option(metavar="SHARE", help="The same as --canary, but users' feedback decides.")] = None,
    block: Annotated[bool, typer.Option("--block", help="Stay in the foreground until Ctrl-C.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Take this model off the endpoint; the last one ends it.")] = False,
) -> None:  # fmt: skip
    """Put the champion behind an HTTP endpoint, which stays up in the background until --stop; or another beside it."""
    from orchestrator.errors import UserError
    from orchestrator.serving.plans import parse_share

    wished = {mode: share for mode, share in (("canary", canary), ("shadow", shadow), ("ab", ab)) if share is not None}
    if len(wished) + block + stop > 1:
        raise UserError("--canary, --shadow, --ab, --block and --stop exclude each other", "give one of them")
    rollouts: list[tuple[Any, float]] = [(mode, parse_share(share)) for mode, share in wished.items()]

    def act(pipeline: Pipeline) -> Record | dict[str, Any]:
        stage = pipeline.serve_stage()
        for mode, share in rollouts:
            return stage.roll_out(version, mode, share)
        if stop:
            return stage.stop()
        if block:
            return stage.in_foreground(version)
        return stage.serve(stage.version_to_serve(version))

    run_verb("serve", recipe, set_, storage, address, json_, act)


@app.command()
def check(recipe: RecipePath, set_: Overrides = None, storage: StorageRoot = None, json_: AsJson = False) -> None:
    """Validate the recipe and its data, and plan the run without starting it."""
    from orchestrator.check import plan_run

    run_verb("check", recipe, set_, storage, None, json_, plan_run)


@app.command()
def init(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A table of texts or a folder of class folders.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Where to write the recipe.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
) -> None:
    """Look at the data, infer its schema, write a recipe, say what was seen."""
    from orchestrator.init import write_starting_recipe

    _out(write_starting_recipe(path, output, force=force))


@app.command()
def models(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[NAME | promote NAME VERSION | rollback NAME | verify NAME]")] = None,
    storage: StorageRoot = None, recipe: StorageOf = None,
    registry: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the registry.")] = None,
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    json_: AsJson = False,
) -> None:  # fmt: skip
    """List models or a model's versions; move an alias to a version or back; check a model's files."""
    from orchestrator.serve import change_models

    root, url = _place_of(recipe, storage)
    values, text = change_models(root, registry or url, arguments or [], alias)
    _out(json.dumps(values, ensure_ascii=False) if json_ else text)


def _place_of(recipe: str | None, storage: str | None) -> tuple[str, str | None]:
    """Storage and registry of a recipe, or what usually is the storage."""
    if recipe is None:
        return storage or "./runs", None
    from orchestrator.recipe_file import load_recipe

    read = load_recipe(recipe, (), storage)
    return read.storage, read.registry.url


keys = typer.Typer(help="Who may ask the endpoint (serving.keys: true).", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys, name="keys")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Of who or what will ask with it.")],
    storage: StorageRoot = None, recipe: StorageOf = None,
    scope: Annotated[list[str] | None, typer.Option(help="predict, feedback or admin; predict and feedback if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it opens; all if none is named.")] = None,
    per_second: Annotated[float | None, typer.Option(help="Requests, at most.")] = None,
    per_day: Annotated[int | None, typer.Option(help="Inputs, at most, of a day in UTC.")] = None,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Make a key, which is shown this once."""
    from orchestrator.present import key_made
    from orchestrator.serving.access import make_key, told

    root, _ = _place_of(recipe, storage)
    key, text = make_key(root, name, scope or (), model or (), per_second, per_day)
    _out(json.dumps(told(key) | {"key": text}) if json_ else key_made(told(key), text, root))


@keys.command("list")
def list_keys(storage: StorageRoot = None, recipe: StorageOf = None, json_: AsJson = False) -> None:
    """Keys, what they open, and how many inputs they have sent today."""
    from orchestrator.present import keys_table
    from orchestrator.serving.access import keys_and_use

    root, _ = _place_of(recipe, storage)
    known = keys_and_use(root)
    _out(json.dumps({"keys": known}) if json_ else keys_table(known, root))


@keys.command("revoke")
def revoke_key(
    number: Annotated[str, typer.Argument(metavar="ID", help="As `orchestrator keys list` shows it.")],
    storage: StorageRoot = None, recipe: StorageOf = None, json_: AsJson = False,
) -> None:  # fmt: skip
    """Close a key for good; endpoints notice within seconds."""
    from orchestrator.serving.access import revoke, told

    key = told(revoke(_place_of(recipe, storage)[0], number))
    _out(json.dumps(key) if json_ else f"revoked {key['id']} ({key['name']})")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=" | ".join(VERBS))],
    recipe: RecipePath,
    address: Annotated[str, typer.Option("--address", metavar="URL", help="The cluster's job server.")],
    set_: Overrides = None, storage: StorageRoot = None, json_: AsJson = False,
) -> None:  # fmt: skip
    """Run a verb as a job of a Ray cluster, its output streamed; ends with the job's own exit status. What the verb takes
    besides, such as --canary 10%, comes after RECIPE."""
    from orchestrator.recipe_file import load_recipe

    if verb not in VERBS:
        raise UserError(f"submit knows no verb {verb!r}", f"use one of {', '.join(VERBS)}")
    load_recipe(recipe, set_ or (), storage)
    from orchestrator.submit import submit_job

    words = [recipe, *(w for override in set_ or () for w in ("--set", override))]
    words += ["--storage", storage] if storage else []
    words += context.args
    raise typer.Exit(submit_job(address, verb, [*words, *(["--json"] if json_ else [])]))


@app.command()
def doctor(address: Address = None, json_: AsJson = False) -> None:
    """What this machine and cluster have, what is missing, and what to do about it."""
    from orchestrator.doctor import examine

    findings = examine(address)
    _out(json.dumps(findings.values) if json_ else findings.text)
    raise typer.Exit(0 if findings.healthy else 1)


if __name__ == "__main__":
    main()
