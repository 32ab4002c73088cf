"""The Dockerfile: what it copies is there, what it installs is pinned, and what runs is no root."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str
    stage: int
    """0 before the first FROM."""


def instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, stage = [], 0
    for line in re.split(r"\n(?=\S)", re.sub(r"\\\n", " ", "\n".join(lines))):
        name, _, rest = line.partition(" ")
        stage += name == "FROM"
        found.append(Instruction(name, " ".join(rest.split()), stage))
    return found


def named(name: str, stage: int | None = None) -> list[str]:
    return [i.rest for i in instructions() if i.name == name and stage in (None, i.stage)]


def last_stage() -> int:
    return max(i.stage for i in instructions())


def test_every_line_is_an_instruction() -> None:
    assert {i.name for i in instructions()} == KNOWN


def test_everything_it_copies_is_there_and_reaches_the_build() -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split("\n")
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {word for rest in named("COPY") if not rest.startswith("--from") for word in rest.split()[:-1]}
    assert copied == let_through
    assert all((ROOT / word).exists() for word in copied)
    assert not any(fnmatch.fnmatch(word, "*venv*") for word in copied)


def test_one_argument_chooses_cpu_or_cuda() -> None:
    assert "DEVICE=cpu" in named("ARG")
    (torch,) = (rest for rest in named("RUN") if "torch torchvision" in rest)
    guard = torch[torch.index("case") : torch.index("esac") + 4]
    for device, status in (("cpu", 0), ("cuda", 0), ("tpu", 1)):
        ran = subprocess.run(["sh", "-c", guard], env={"DEVICE": device}, capture_output=True)
        assert ran.returncode == status, device
    assert "torch.version.cuda" in torch


def test_packages_are_the_tested_ones_and_come_from_wherever_pip_is_configured_to_look() -> None:
    installs = [part for rest in named("RUN") for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("-c constraints.txt" in part or "--no-deps ." in part for part in installs)
    assert not re.search(
        r"https?://", "".join(named("RUN") + named("ARG") + named("FROM")).replace("http://127.0.0.1", "")
    )


def test_what_the_recipes_and_the_endpoint_may_ask_for_is_inside() -> None:
    """The image answers with compressed models, explains images and sends traces."""
    (requirements,) = (rest for rest in named("RUN") if "requirements.txt" in rest)
    script = requirements[requirements.index('"') + 1 : requirements.rindex('"')]
    (extras,) = (rest.removeprefix("EXTRAS=").strip('"') for rest in named("ARG") if rest.startswith("EXTRAS="))
    said = subprocess.run(
        [sys.executable, "-c", script.replace("$EXTRAS", extras)], cwd=ROOT, capture_output=True, text=True
    )
    names = {re.split(r"[>=\[]", line)[0] for line in said.stdout.splitlines()}
    assert {"ray", "onnxruntime", "openvino", "nncf", "captum", "opentelemetry-exporter-otlp-proto-http"} <= names, (
        said.stderr
    )


def test_code_is_copied_after_its_dependencies_are_installed() -> None:
    order = [i.rest for i in instructions()]
    assert order.index("orchestrator ./orchestrator") > next(n for n, r in enumerate(order) if "requirements.txt" in r)


def test_the_container_is_no_root_and_starts_no_node_without_a_token() -> None:
    assert named("USER", last_stage()) == ["1000:1000"]
    after_user = [i.name for i in instructions() if i.stage == last_stage()]
    assert after_user.index("USER") > max(n for n, name in enumerate(after_user) if name in {"RUN", "COPY"})
    assert any("RAY_AUTH_MODE=token" in rest for rest in named("ENV", last_stage()))
    assert named("CMD", last_stage()) == [
        '["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0", "--disable-usage-stats"]'
    ]


def test_kuberays_tools_are_inside() -> None:
    (packages,) = (rest for rest in named("RUN", last_stage()) if "apt-get install" in rest)
    assert {"bash", "wget", "rsync"} <= set(packages.split())
    assert "rm -rf /var/lib/apt/lists/*" in packages


def test_a_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter, "it comes with the test extra"
    said = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
