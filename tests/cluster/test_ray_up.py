"""The files for `ray up`, through the steps that Ray itself takes before it rents or reaches a machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import orchestrator

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
both = pytest.mark.parametrize("name", ["ray-up.yaml", "ray-up-on-premise.yaml"])


def written(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return values


def prepared(name: str) -> dict[str, Any]:
    values: dict[str, Any] = prepare_config(written(name))
    return values


@both
def test_ray_takes_it(name: str) -> None:
    validate_config(prepared(name))


@both
def test_a_misspelt_key_would_be_refused(name: str) -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepared(name) | {"idle_timeout_minute": 1})


@both
def test_nodes_run_our_image_and_nothing_is_installed_on_them(name: str) -> None:
    """Ray's own defaults would install another Ray."""
    config = prepared(name)
    assert config["docker"]["image"] == f"ray-orchestrator:{orchestrator.__version__}-cpu"
    for step in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[step] == [], step


@both
def test_nodes_ask_for_the_token_and_the_dashboard_listens_to_the_head_alone(name: str) -> None:
    config = prepared(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/orchestrator/.ray/auth_token": "~/.ray/auth_token"}
    (head,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert all("$RAY_HEAD_IP:6379" in c for c in config["worker_start_ray_commands"] if "ray start" in c)


def test_rented_workers_come_with_the_work() -> None:
    config = prepared("ray-up.yaml")
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["worker"]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert 0 <= worker["min_workers"] <= worker["max_workers"] <= config["max_workers"]


def test_own_machines_are_all_used() -> None:
    config = prepared("ray-up-on-premise.yaml")
    (nodes,) = config["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(config["provider"]["worker_ips"])
