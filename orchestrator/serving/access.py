"""Who may ask an endpoint: keys, what each of them opens, and how often.

In: what a request shows. Out: its key, or an ``ApiError`` that says why not. A key is shown once, to whom it is made for; kept
of it is a hash, in a folder of its own in the storage, so that two who make keys at a time lose none. Its secret has 256 random
bits: nobody finds it by trying, however fast the hash is. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import secrets
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import UserError
from orchestrator.serving.contract import ApiError
from orchestrator.serving.prediction_files import files_in
from orchestrator.serving.watching import Complaints
from orchestrator.storage import KEY, Storage, key_location, keys_location, usage_location

Scope = Literal["predict", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = ("predict", "feedback", "admin")
_PREFIX, _ID_BYTES, _SECRET_BYTES = "orc", 6, 32


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Stands in the key itself, in the open."""
    name: str
    """Of who or what asks with it."""
    sha256: str
    """Of the secret."""
    scopes: tuple[Scope, ...]
    models: tuple[str, ...] = ()
    """That it opens; all if empty."""
    per_second: float | None = Field(default=None, gt=0.0)
    """Requests, at most; as many may come at once as in one second."""
    per_day: int | None = Field(default=None, ge=1)
    """Inputs, at most, of a day in UTC."""
    created: str


def create_key(
    storage: Storage, name: str, scopes: tuple[Scope, ...] = ("predict", "feedback"), models: tuple[str, ...] = (),
    per_second: float | None = None, per_day: int | None = None,
) -> tuple[Key, str]:  # fmt: skip
    """The key as it is kept, and the text that opens: it cannot be had again."""
    number, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    key = Key(id=number, name=name, sha256=_hash(secret), scopes=scopes, models=models, per_second=per_second,
              per_day=per_day, created=datetime.now(UTC).isoformat(timespec="seconds"))  # fmt: skip
    storage.write_json(f"{key_location(number)}/{KEY}", key.model_dump(mode="json"))
    return key, f"{_PREFIX}_{number}_{secret}"


@contextlib.contextmanager
def own_key(storage: Storage, model: str) -> Iterator[str]:
    """For the block: to see, once it is deployed, whether a model answers."""
    key, text = create_key(storage, "deployment", ("predict",), (model,))
    try:
        yield text
    finally:
        storage.remove(key_location(key.id))


def list_keys(storage: Storage) -> list[Key]:
    complaints = Complaints()
    found = (_read(storage, number, complaints) for number in storage.children(keys_location()))
    return sorted((key for key in found if key is not None), key=lambda key: (key.created, key.id))


def make_key(
    root: str, name: str, scopes: Sequence[str], models: Sequence[str], per_second: float | None, per_day: int | None
) -> tuple[Key, str]:
    """``create_key``, of what a user typed. Raises UserError."""
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"there is no scope {scope[:40]!r}", f"there are {', '.join(SCOPES)}")
    asked: Any = tuple(dict.fromkeys(scopes)) or ("predict", "feedback")
    try:
        return create_key(Storage(root), name, asked, tuple(models), per_second, per_day)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{field}: {first['msg']}, but got {first['input']}", "give another number") from None


def keys_and_use(root: str) -> list[dict[str, Any]]:
    """Of each key what may be shown, and what it has used today; endpoints write that down within seconds."""
    storage = Storage(root)
    used = used_on(storage, datetime.now(UTC).date().isoformat())
    return [told(key, used) for key in list_keys(storage)]


def used_on(storage: Storage, day: str, host: str | None = None) -> Counter[str]:
    """Key -> inputs, as all gateways have written them down, or those of one machine alone."""
    used = Counter[str]()
    for file in files_in(storage, usage_location(day), ".json"):
        if host is None or _host_of(file.rpartition("/")[2]) == host:
            used.update(storage.read_json(file) or {})
    return used


def _host_of(writer: str) -> str:
    return writer.rpartition("-")[0]


def revoke(root: str, number: str) -> Key:
    """For good; endpoints notice within seconds. Raises UserError when there is no such key."""
    storage = Storage(root)
    key = next((key for key in list_keys(storage) if key.id == number), None)
    if key is None:
        raise UserError(f"there is no key {number[:40]!r}", "see which there are: orchestrator keys list")
    storage.remove(key_location(number))
    return key


def _read(storage: Storage, number: str, complaints: Complaints) -> Key | None:
    """None for one that is no more, damaged or not to be read: it opens nothing, and keeps no other from opening."""
    location = f"{key_location(number)}/{KEY}"
    try:
        values = storage.read_json(location)
        key = None if values is None else Key.model_validate(values)
    except ValueError:
        complaints.tell(number, f"the key {storage.place(location)} is damaged: revoke it, and create another")
    except OSError as error:
        why = error.strerror or str(error)
        complaints.tell(
            number, f"the key {storage.place(location)} cannot be read ({why}): let the endpoint's user read it"
        )
    else:
        complaints.settle(number)
        return key
    return None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass
class _Spent:
    """By one key."""

    tokens: float
    """Requests that it may send at once."""
    at_s: float
    today: int = 0
    """Inputs."""
    before: int = 0
    """Of those: that this process did not count itself."""


@dataclass
class Keys:
    """Those of one storage, as an endpoint knows them: read again now and then, and what they have spent written down."""

    storage: Storage
    clock: Callable[[], float] = time.monotonic
    day: Callable[[], str] = lambda: datetime.now(UTC).date().isoformat()
    known: dict[str, Key] = field(default_factory=dict)
    spent: dict[str, _Spent] = field(default_factory=dict)
    counted: str = ""
    """The day that is counted."""
    written: Mapping[str, int] = field(default_factory=dict)
    writer: str = field(default_factory=lambda: f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}")
    """Several gateways write down what was used, each in a file of its own."""
    complaints: Complaints = field(default_factory=Complaints)

    def refresh(self) -> None:
        """Forget keys that were revoked, learn new ones, write down what was used. One call at a time."""
        there = self.storage.children(keys_location())
        self.known = {number: key for number, key in self.known.items() if number in there}
        new = {number: _read(self.storage, number, self.complaints) for number in there if number not in self.known}
        self.known |= {number: key for number, key in new.items() if key is not None}
        self._begin_day()
        used = {number: spent.today - spent.before for number, spent in list(self.spent.items())}
        used = {number: inputs for number, inputs in used.items() if inputs}
        if used != self.written:
            self.storage.write_json(f"{usage_location(self.counted)}/{self.writer}.json", used)
            self.written = used

    def used(self) -> dict[str, int]:
        """Key -> inputs of today."""
        return {number: spent.today for number, spent in list(self.spent.items()) if spent.today}

    def _begin_day(self) -> None:
        """What was counted on this machine before a restart counts; what was counted yesterday does not."""
        today = self.day()
        if today == self.counted:
            return
        earlier = {} if self.counted else used_on(self.storage, today, _host_of(self.writer))
        for number in {*self.spent, *earlier}:
            spent = self._of(number)
            spent.today = spent.before = earlier.get(number, 0)
        self.counted, self.written = today, {}

    def admit(self, shown: str | None, scope: Scope | None, model: str | None) -> Key:
        """The key that a request shows, which counts as one of its requests. ``scope``: None for what any key opens; ``model``:
        None for what concerns all.

        Raises ApiError 401, 403 or 429.
        """
        key = self._recognised(shown)
        is_scoped = scope is None or scope in key.scopes
        if not is_scoped or not _opens(key, model):
            what = scope if not is_scoped else "what concerns all models" if model is None else f"the model {model}"
            raise ApiError(403, "forbidden", f"the key {key.name!r} does not open {what}", "ask for one that does")
        self._take_request(key)
        return key

    def opens(self, shown: str | None, model: str) -> bool:
        """Whether a model is to be seen with what a request shows."""
        try:
            return _opens(self._recognised(shown), model)
        except ApiError:
            return False

    def _recognised(self, shown: str | None) -> Key:
        if not shown:
            raise ApiError(401, "no_key", "a key is needed here", "send it as: authorization: Bearer KEY")
        prefix, _, rest = shown.partition("_")
        number, _, secret = rest.partition("_")
        key = self.known.get(number)
        # all of them take as long, so that nobody learns which ids there are
        fits = hmac.compare_digest(_hash(secret), key.sha256 if key else "0" * 64)
        if key is None or prefix != _PREFIX or not fits:
            raise ApiError(401, "wrong_key", "this key is not known here, or was revoked", "ask for a new one")
        return key

    def _of(self, number: str) -> _Spent:
        if number not in self.spent:
            self.spent[number] = _Spent(math.inf, self.clock())
        return self.spent[number]

    def _take_request(self, key: Key) -> None:
        if key.per_second is None:
            return
        spent, now, most = self._of(key.id), self.clock(), max(1.0, key.per_second)
        spent.tokens = min(most, spent.tokens + (now - spent.at_s) * key.per_second)
        spent.at_s = now
        if spent.tokens < 1.0:
            wait_s = math.ceil((1.0 - spent.tokens) / key.per_second)
            raise ApiError(429, "rate_limited", f"the key {key.name!r} may send {key.per_second:g} requests a second",
                           "send fewer, or ask for a key that may send more", retry_after_s=max(1, wait_s))  # fmt: skip
        spent.tokens -= 1.0

    def take_inputs(self, key: Key, inputs: int) -> None:
        """Counts them, or raises ApiError 429 and counts none."""
        spent = self._of(key.id)
        if key.per_day is not None and spent.today + inputs > key.per_day:
            left_s = 86_400 - int(time.time()) % 86_400
            raise ApiError(429, "quota_used_up", f"the key {key.name!r} may send {key.per_day} inputs a day, and has sent "
                           f"{spent.today}", "go on tomorrow (UTC), or ask for more", retry_after_s=left_s)  # fmt: skip
        spent.today += inputs

    def give_back(self, key: Key, inputs: int) -> None:
        """That were taken, and not computed."""
        spent = self._of(key.id)
        spent.today = max(spent.before, spent.today - inputs)  # another day may have begun


@dataclass
class Rings:
    """The keys of each storage that models come from."""

    known: dict[str, Keys] = field(default_factory=dict)
    """By the storage's URL."""
    complaints: Complaints = field(default_factory=Complaints)
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, storage: str) -> None:
        if storage not in self.known:
            keys = Keys(Storage(storage))
            keys.refresh()
            self.known.setdefault(storage, keys)

    def refresh(self) -> None:
        with self.one_at_a_time:
            for storage, keys in list(self.known.items()):
                try:
                    keys.refresh()
                except Exception as error:  # noqa: BLE001  (those known so far go on being used)
                    self.complaints.tell(storage, f"cannot see the keys in {storage}: {error!r}", exc_info=True)
                else:
                    self.complaints.settle(storage)


def _opens(key: Key, model: str | None) -> bool:
    """``model``: None for what concerns all."""
    return not key.models or model in key.models


def admit_any(locks: Sequence[Keys], shown: str | None) -> Key:
    """An administrator of all models in any of these. Raises ApiError as the one does that knows the key."""
    for keys in locks[:-1]:
        try:
            return keys.admit(shown, "admin", None)
        except ApiError as error:
            if error.status != 401:
                raise
    return locks[-1].admit(shown, "admin", None)


def key_in(headers: Mapping[str, str]) -> str | None:
    """``authorization: Bearer KEY`` or ``x-api-key: KEY``."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("x-api-key")


def told(key: Key, used: Mapping[str, int] | None = None) -> dict[str, Any]:
    """For people and programs: everything but the hash."""
    values = key.model_dump(mode="json", exclude={"sha256"})
    return values | {"used_today": (used or {}).get(key.id, 0)}
