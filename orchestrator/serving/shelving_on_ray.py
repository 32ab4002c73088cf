"""Models come to the shelf and leave it, one command at a time.

In: a version, or a model's name. Out: a shelf that holds it, or holds it no more; an empty one does not stay. Every function
expects Ray to be connected already, and raises ServingFailed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import ServingFailed
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe_serving import Shelf
from orchestrator.serving.applications_on_ray import (
    READY_S,
    applications,
    asked_directly,
    called,
    delete,
    described,
    one_at_a_time,
    submit,
    wait_running,
)
from orchestrator.serving.door_on_ray import GATEWAY
from orchestrator.serving.known_answers import check_known_answers
from orchestrator.serving.served import SHELF_APP, Served
from orchestrator.serving.shelf_on_ray import shelf_app


def put_on_shelf(served: Served, report: Report, known: Sequence[Mapping[str, Any]]) -> None:
    """The version loads there and answers as it was evaluated before any client is sent to it; what answered before goes on
    until then. Raises ServingFailed."""
    with one_at_a_time(SHELF_APP):
        try:
            terms, models = _shelf(served.settings.shelf, report)
            others = len(models.keys() - {served.name})
            report(Event("serve", message=f"{served.name} version {served.version} comes to the shelf, beside "
                                          f"{others} models"))  # fmt: skip
            _load_on_shelf(served, models.get(served.name), known)
            _fill_shelf(terms, models | {served.name: served})
        except ServingFailed:
            _clear_away_if_empty()
            raise
    wait_running(GATEWAY)
    wait_places(served.name, lambda places: SHELF_APP in places)
    delete(served.app)


def _load_on_shelf(served: Served, before: Served | None, known: Sequence[Mapping[str, Any]]) -> None:
    ask = asked_directly(SHELF_APP, "answer", served, served.key)
    try:
        ask([])  # loads it, and says why not
        check_known_answers(ask, served.name, known, served.at_once)
    except ServingFailed:
        if before != served:
            called(SHELF_APP, "forget", READY_S, served, model=served.key)
        raise


def take_off_shelf(name: str) -> bool:
    """False if it did not stand there. The last one takes the shelf with it."""
    if SHELF_APP not in applications():
        return False
    with one_at_a_time(SHELF_APP):
        models = on_shelf()
        stood = models.pop(name, None) is not None
        if stood:
            terms: Shelf = called(SHELF_APP, "listed", READY_S)[0]
            _fill_shelf(terms, models)
            if not models:
                wait_places(name, lambda places: SHELF_APP not in places)  # nobody is sent there any more
        _clear_away_if_empty()
    return stood


def put_back_on_shelf(served: Served) -> None:
    """One that stood there already. Raises ServingFailed."""
    with one_at_a_time(SHELF_APP):
        terms, models = _shelf(served.settings.shelf, ignore)
        _fill_shelf(terms, models | {served.name: served})


def _clear_away_if_empty() -> None:
    """An empty shelf would keep its CPUs."""
    with suppress(ServingFailed):  # one that does not say what stands there is left alone
        if SHELF_APP in applications() and not on_shelf():
            delete(SHELF_APP)


def _shelf(wanted: Shelf, report: Report) -> tuple[Shelf, dict[str, Served]]:
    """Its terms, and what stands there; it is started if it is not there. It keeps those of its terms that the recipe does not
    name. Raises ServingFailed."""
    there = described(SHELF_APP, "listed")
    if there is None:
        _fill_shelf(wanted, {})
        return wanted, {}
    models = {served.name: served for served in there[1]}
    terms = _merged(there[0], wanted)
    if terms != there[0]:
        told = ", ".join(f"{name} {value:g}" for name, value in terms.model_dump().items())
        report(Event("serve", message=f"the shelf that runs here changes to {told}"))
        _fill_shelf(terms, models)
    return terms, models


def _merged(terms: Shelf, wanted: Shelf) -> Shelf:
    try:
        return Shelf.model_validate(terms.model_dump() | wanted.model_dump(include=wanted.model_fields_set))
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ServingFailed(f"serving.shelf does not go with the shelf that runs here: {told}", "name both") from None


def _fill_shelf(terms: Shelf, models: Mapping[str, Served]) -> None:
    """Raises ServingFailed."""
    submit(SHELF_APP, shelf_app(terms, list(models.values())))
    wait_running(SHELF_APP)


def on_shelf() -> dict[str, Served]:
    """What stands there, by name. Raises ServingFailed if the shelf does not say."""
    listed = described(SHELF_APP, "listed")
    return {} if listed is None else {served.name: served for served in listed[1]}


def wait_places(name: str, right: Callable[[list[str]], bool]) -> None:
    """Until the places where the gateway could ask the model are right. Raises ServingFailed."""
    deadline = time.monotonic() + READY_S
    while not right(places := called(GATEWAY, "places", READY_S, name)):
        if time.monotonic() > deadline:
            raise ServingFailed(f"the gateway still asks {name} at {places or 'no place'}", "see Serve's logs")
        time.sleep(0.1)
