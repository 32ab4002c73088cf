"""Keys: what each opens, how often; nothing secret is kept."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.serving.access import (
    Keys,
    admit_any,
    create_key,
    key_in,
    keys_and_use,
    list_keys,
    make_key,
    own_key,
    revoke,
    used_on,
)
from orchestrator.serving.contract import ApiError
from orchestrator.storage import Storage


class Clock:
    seconds, date = 100.0, "2026-11-28"

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "runs"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ring(storage: Storage, clock: Clock) -> Callable[[], Keys]:
    def read() -> Keys:
        keys = Keys(storage, clock, lambda: clock.date)
        keys.refresh()
        return keys

    return read


def refused(keys: Keys, *asked: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        keys.admit(*asked)
    return caught.value


def test_of_a_key_only_a_hash_is_kept(storage: Storage, tmp_path: Path) -> None:
    key, text = create_key(storage, "shop")
    secret = text.split("_", 2)[2]
    assert len(secret) >= 43 and key.id in text
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept and not any(secret in content for content in kept)
    assert list_keys(storage) == [key]


def test_a_key_opens_what_it_was_made_for(storage: Storage, ring: Callable[[], Keys]) -> None:
    _, text = create_key(storage, "shop", ("predict",), ("reviews",))
    keys = ring()
    assert keys.admit(text, "predict", "reviews").name == "shop"
    assert keys.admit(text, None, "reviews").name == "shop", "looking takes no scope"
    assert refused(keys, text, "feedback", "reviews").status == 403
    assert "the model digits" in refused(keys, text, "predict", "digits").message
    assert keys.opens(text, "reviews") and not keys.opens(text, "digits") and not keys.opens(None, "reviews")


@pytest.mark.parametrize("change", [
    lambda text: None, lambda text: "", lambda text: text[:-1], lambda text: text + "x", lambda text: text.upper(),
    lambda text: "orc_" + "0" * 12 + "_" + text.split("_", 2)[2], lambda text: text.replace("orc_", ""),
    lambda text: text.replace("orc_", "abc_"), lambda text: "_" * 5, lambda text: "\u00e4" * 70,
])  # fmt: skip
def test_anything_else_opens_nothing(
    change: Callable[[str], str | None], storage: Storage, ring: Callable[[], Keys]
) -> None:
    _, text = create_key(storage, "shop")
    error = refused(ring(), change(text), "predict", "reviews")
    assert error.status == 401 and error.next_step
    assert text.split("_", 2)[2] not in str(error.body())


def test_a_key_that_is_revoked_opens_no_more_and_a_new_one_does(storage: Storage, ring: Callable[[], Keys]) -> None:
    key, text = create_key(storage, "shop")
    keys = ring()
    keys.admit(text, "predict", "reviews")
    assert revoke(storage.url, key.id) == key
    _, other = create_key(storage, "other")
    keys.refresh()
    assert refused(keys, text, "predict", "reviews").code == "wrong_key"
    assert keys.admit(other, "predict", "reviews").name == "other"
    with pytest.raises(UserError, match="there is no key"):
        revoke(storage.url, key.id)


def test_the_deployers_own_key_is_gone_afterwards(storage: Storage, ring: Callable[[], Keys]) -> None:
    with own_key(storage, "reviews") as text:
        assert ring().admit(text, "predict", "reviews")
    assert list_keys(storage) == []


def test_requests_per_second(storage: Storage, ring: Callable[[], Keys], clock: Clock) -> None:
    _, text = create_key(storage, "shop", per_second=2)
    _, free = create_key(storage, "free")
    keys = ring()
    for _ in range(2):
        keys.admit(text, "predict", "reviews")
    error = refused(keys, text, "predict", "reviews")
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limited", 1)
    for _ in range(50):
        keys.admit(free, "predict", "reviews")
    clock.seconds += 0.5
    keys.admit(text, "predict", "reviews")
    assert refused(keys, text, "predict", "reviews").status == 429
    clock.seconds += 1000
    for _ in range(2):
        keys.admit(text, "predict", "reviews")
    assert refused(keys, text, "predict", "reviews").status == 429, "what was not used is not saved up"


def test_a_slow_key_is_told_when_to_come_again(storage: Storage, ring: Callable[[], Keys], clock: Clock) -> None:
    _, text = create_key(storage, "shop", per_second=0.1)
    keys = ring()
    keys.admit(text, "predict", "reviews")
    assert refused(keys, text, "predict", "reviews").retry_after_s == 10
    clock.seconds += 10
    keys.admit(text, "predict", "reviews")


def test_inputs_per_day_outlive_a_restart_and_begin_anew_the_next_day(
    storage: Storage, ring: Callable[[], Keys], clock: Clock
) -> None:
    key, _ = create_key(storage, "shop", per_day=10)
    keys = ring()
    keys.take_inputs(key, 7)
    with pytest.raises(ApiError, match="quota_used_up") as caught:
        keys.take_inputs(key, 4)
    assert caught.value.status == 429 and 0 < (caught.value.retry_after_s or 0) <= 86_400
    keys.take_inputs(key, 3)
    keys.refresh()
    again = ring()
    with pytest.raises(ApiError):
        again.take_inputs(key, 1)
    clock.date = "2026-11-29"
    again.refresh()
    again.take_inputs(key, 10)
    again.refresh()
    assert again.used() == {key.id: 10}
    assert used_on(storage, "2026-11-28") == {key.id: 10}


def test_what_several_gateways_count_is_summed_and_none_writes_over_the_other(storage: Storage, clock: Clock) -> None:
    key, _ = create_key(storage, "shop", per_day=10)

    def gateway(writer: str) -> Keys:
        keys = Keys(storage, clock, lambda: clock.date, writer=writer)
        keys.refresh()
        return keys

    one, other = gateway("node-a-1"), gateway("node-2")
    one.take_inputs(key, 3)
    other.take_inputs(key, 4)
    for keys in (one, other, one):
        keys.refresh()
    assert used_on(storage, clock.date) == {key.id: 7}
    again = gateway("node-a-3")  # the first one was started again, on the same machine
    assert again.used() == {key.id: 3}
    again.take_inputs(key, 7)
    with pytest.raises(ApiError):
        again.take_inputs(key, 1)
    again.refresh()
    assert used_on(storage, clock.date) == {key.id: 14}


def test_a_key_that_cannot_be_read_keeps_no_other_from_being_revoked_known_or_counted(
    storage: Storage, ring: Callable[[], Keys], clock: Clock, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    keys = ring()
    (gone, revoked), (used, _) = create_key(storage, "gone"), create_key(storage, "used")
    keys.refresh()
    keys.take_inputs(used, 5)
    (locked, shut), (_, fresh) = create_key(storage, "locked"), create_key(storage, "fresh")
    revoke(storage.url, gone.id)
    read = storage.read_json

    def refuse(location: str) -> Any:
        if locked.id in location:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(location)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_json", refuse)
        for _ in range(3):
            keys.refresh()
    assert refused(keys, revoked, "predict", "reviews").status == 401
    assert refused(keys, shut, "predict", "reviews").status == 401
    assert keys.admit(fresh, "predict", "reviews").name == "fresh"
    assert used_on(storage, clock.date) == {used.id: 5}
    (told,) = caplog.records
    assert f"serve/keys/{locked.id}/key.json" in told.message and "Permission denied" in told.message
    keys.refresh()
    assert keys.admit(shut, "predict", "reviews").name == "locked", "it is asked again"


def test_an_administrator_of_some_models_is_none_of_all(
    storage: Storage, ring: Callable[[], Keys], tmp_path: Path
) -> None:
    _, some = create_key(storage, "team", ("admin",), ("reviews",))
    _, often = create_key(storage, "hasty", ("admin",), per_second=0.1)
    other = Keys(Storage(str(tmp_path / "other")))
    assert refused(ring(), some, "admin", None).status == 403
    locks = [ring(), other]
    assert admit_any(locks, often).name == "hasty"
    with pytest.raises(ApiError) as caught:
        admit_any(locks, often)
    assert caught.value.status == 429, "and not that the second does not know it"


@pytest.mark.parametrize("content", ["", "[1]", '{"id": "x"}', None])
def test_a_damaged_key_opens_nothing_and_keeps_no_other_from_opening(
    content: str | None, storage: Storage, ring: Callable[[], Keys]
) -> None:
    (damaged, text), (_, sound) = create_key(storage, "damaged"), create_key(storage, "sound")
    file = storage.path(f"serve/keys/{damaged.id}/key.json")
    file.write_text(file.read_text().replace('"predict"', '"everything"') if content is None else content)
    keys = ring()
    assert refused(keys, text, "predict", "reviews").status == 401
    assert keys.admit(sound, "predict", "reviews").name == "sound"
    assert [key.name for key in list_keys(storage)] == ["sound"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"scopes": ["everything"]}, "no scope 'everything'"), ({"per_second": 0.0}, "--per-second: .* greater than 0"),
     ({"per_day": -1}, "--per-day: .* but got -1")],
)  # fmt: skip
def test_mistakes_of_who_makes_a_key(asked: dict[str, Any], told: str, storage: Storage) -> None:
    values: dict[str, Any] = {"scopes": (), "models": (), "per_second": None, "per_day": None} | asked
    with pytest.raises(UserError, match=told):
        make_key(storage.url, "shop", **values)
    assert list_keys(storage) == []


def test_keys_and_what_they_used_hold_no_hash(storage: Storage) -> None:
    key, _ = make_key(storage.url, "shop", (), (), None, None)
    (shown,) = keys_and_use(storage.url)
    assert shown["scopes"] == ["predict", "feedback"] and shown["used_today"] == 0
    assert key.sha256 not in json.dumps(shown)


@pytest.mark.parametrize(
    ("headers", "key"),
    [({"authorization": "Bearer k"}, "k"), ({"authorization": "bearer  k "}, "k"), ({"x-api-key": "k"}, "k"), ({}, None),
     ({"authorization": "Basic k"}, None), ({"authorization": "Basic k", "x-api-key": "j"}, "j"),
     ({"authorization": "Bearer"}, "")],
)  # fmt: skip
def test_where_a_key_stands(headers: dict[str, str], key: str | None) -> None:
    assert key_in(headers) == key
