"""The pinned versions agree with what each package asks of the others, so that a new machine can install them."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
EXTRAS = ("demo", "test", "lint")


def pins(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, _, version in (line.partition("==") for line in lines)}


def asked_for(name: str, extras: tuple[str, ...], seen: set[tuple[str, str]]) -> list[tuple[str, Requirement]]:
    """Whatever `name` with `extras` needs, and what that needs in turn: pairs of who asks and what is asked."""
    try:
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        return []
    found = []
    for extra in ("", *extras):
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        for wanted in requirements:
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                found += [(name, wanted), *asked_for(wanted.name, tuple(wanted.extras), seen)]
    return found


def disagreements(pinned: dict[str, str], asked: list[tuple[str, Requirement]]) -> list[str]:
    return [
        f"{who} asks for {wanted}, {pinned[canonicalize_name(wanted.name)]} is pinned"
        for who, wanted in asked
        if canonicalize_name(wanted.name) in pinned
        and not wanted.specifier.contains(pinned[canonicalize_name(wanted.name)], prereleases=True)
    ]


def test_no_pin_contradicts_what_a_package_asks_for():
    asked = asked_for("ray-orchestrator", EXTRAS, set())
    assert {"torch", "ray", "tritonclient"} <= {wanted.name for _, wanted in asked}
    assert not disagreements(pins(CONSTRAINTS.read_text()), asked)


def test_a_pin_that_contradicts_is_named():
    asked = [("tritonclient", Requirement("ml-dtypes<=0.5.4"))]
    assert disagreements(pins("ml_dtypes==0.6.0\n"), asked) == [
        "tritonclient asks for ml-dtypes<=0.5.4, 0.6.0 is pinned"
    ]


def test_whatever_a_new_machine_installs_is_pinned():
    pinned = pins(CONSTRAINTS.read_text())
    asked = {canonicalize_name(wanted.name) for _, wanted in asked_for("ray-orchestrator", EXTRAS, set())}
    assert not asked - pinned.keys() - {"ray-orchestrator", "setuptools"}
