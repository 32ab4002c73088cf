"""Where an endpoint listens: what would open it by mistake, or not at all, is said before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from certificates import write_certificate
from pydantic import ValidationError

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Serving, Tls, is_loopback
from orchestrator.serving.address import Endpoint, check_certificate, check_joining, check_port, url_of

TLS = {"certificate": "/etc/c.pem", "key": "/etc/k.pem"}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({}, "without keys: true and tls"), ({"keys": True}, "without tls"), ({"tls": TLS}, "without keys: true")],
)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "models.example"])
def test_an_endpoint_is_not_opened_to_the_network_by_mistake(
    host: str, settings: dict[str, object], missing: str
) -> None:
    with pytest.raises(ValidationError, match=rf"opens the endpoint to the network {missing}: .*open_to_network: true"):
        Serving.model_validate({"host": host, **settings})
    assert Serving.model_validate({"host": host, "open_to_network": True, **settings}).host == host
    assert Serving.model_validate({"host": host, "keys": True, "tls": TLS}).tls == Tls(**TLS)


@pytest.mark.parametrize(
    "settings",
    [{"tls": TLS | {"certificate": "chain.pem"}}, {"tls": TLS | {"key": "./key.pem"}}, {"request_log": "log"}],
)
def test_files_that_another_process_opens_have_full_paths(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="must be a full path, such as /.*: another process"):
        Serving.model_validate(settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_alone_needs_neither(host: str) -> None:
    assert is_loopback(host) and Serving(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.7"])
def test_a_model_without_keys_does_not_join_an_endpoint_on_the_network(host: str) -> None:
    with pytest.raises(ServingFailed, match="this model has no serving.keys"):
        check_joining(host, Serving())
    check_joining(host, Serving(keys=True))
    check_joining(host, Serving(open_to_network=True))
    check_joining("127.0.0.1", Serving())


def test_addresses() -> None:
    assert url_of("127.0.0.1", 8000, secure=False) == "http://127.0.0.1:8000"
    assert url_of("::1", 8443, secure=True) == "https://[::1]:8443"


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse, match="cannot listen on 127.0.0.1"):
        check_port("127.0.0.1", taken.getsockname()[1])


def test_a_certificate_and_its_key(tmp_path: Path) -> None:
    check_certificate(write_certificate(tmp_path))


@pytest.mark.parametrize("fault", ["no file", "no certificate", "another key", "a password"])
def test_files_that_are_no_certificate_and_its_key_are_said(fault: str, tmp_path: Path) -> None:
    tls = write_certificate(tmp_path, b"secret" if fault == "a password" else None)
    if fault == "no file":
        Path(tls.key).unlink()
    elif fault == "no certificate":
        Path(tls.certificate).write_text("nothing")
    elif fault == "another key":
        (tmp_path / "other").mkdir()
        Path(tls.key).write_bytes(Path(write_certificate(tmp_path / "other").key).read_bytes())
    with pytest.raises(ServingFailed, match="are no certificate and its key in PEM") as caught:
        check_certificate(tls)
    assert "password" in caught.value.next_step


def test_nothing_that_answers_is_no_version() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert Endpoint(f"http://127.0.0.1:{probe.getsockname()[1]}").version_of("reviews") is None
