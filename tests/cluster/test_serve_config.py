"""The Serve config, alone and inside the RayService: what Serve's own schema and our own applications say of it."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from orchestrator.serving.on_ray import gateway_application, model_application, shelf_application
from orchestrator.serving.served import MODEL_APP, ModelArguments

CLUSTER = Path(__file__).parent.parent.parent / "cluster"


def alone() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / "serve-config.yaml").read_text())
    return values


def inside_the_service() -> dict[str, Any]:
    service = yaml.safe_load((CLUSTER / "rayservice.yaml").read_text())
    values: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return values


def misspelt(values: dict[str, Any], model: type[BaseModel]) -> set[str]:
    """Serve's schema takes unknown keys in silence: those of ``values`` that it does not know."""
    return values.keys() - model.model_fields.keys()


def test_the_service_deploys_the_same_config() -> None:
    assert inside_the_service() == alone()


def test_serve_knows_every_key() -> None:
    values = alone()
    config = ServeDeploySchema.model_validate(values)
    assert not misspelt(values, ServeDeploySchema)
    assert not misspelt(values["logging_config"], type(config.logging_config))
    for given, application in zip(values["applications"], config.applications, strict=True):
        assert not misspelt(given, type(application))


def test_the_gateway_is_built_as_serve_builds_it() -> None:
    built = call_user_app_builder_with_args_if_necessary(
        gateway_application, alone()["applications"][0].get("args", {})
    )
    assert isinstance(built, Application)
    for wrong, told in (({"storage": "x"}, "storage"), ({"host": "0.0.0.0"}, "to the network without tls")):
        with pytest.raises(ValidationError, match=told):
            call_user_app_builder_with_args_if_necessary(gateway_application, wrong)


def test_a_models_arguments_are_those_its_builder_takes() -> None:
    arguments = alone()["applications"][1]["args"]
    assert ModelArguments.model_validate(arguments).name == "reviews"
    with pytest.raises(ValidationError, match="strorage"):
        call_user_app_builder_with_args_if_necessary(model_application, arguments | {"strorage": "elsewhere"})


def test_a_shelf_is_built_with_its_models_as_what_may_change_without_a_restart() -> None:
    built = call_user_app_builder_with_args_if_necessary(shelf_application, {"bytes": 5_000_000, "models": []})
    deployment = built._bound_deployment
    assert deployment.user_config["terms"]["bytes"] == 5_000_000
    assert deployment.user_config["models"] == []
    again = call_user_app_builder_with_args_if_necessary(shelf_application, {"bytes": 6_000_000})._bound_deployment
    assert deployment.version is not None and deployment.version == again.version, "else all replicas would start again"
    with pytest.raises(ValidationError, match="modells"):
        call_user_app_builder_with_args_if_necessary(shelf_application, {"modells": []})


def test_the_applications_name_builders_that_are_there() -> None:
    for application in alone()["applications"]:
        module, name = application["import_path"].split(":")
        assert getattr(import_module(module), name) in (gateway_application, model_application)


def test_one_gateway_answers_and_each_model_has_the_name_that_the_gateway_looks_for() -> None:
    gateway, *models = alone()["applications"]
    assert gateway["route_prefix"] is None and models
    for model in models:
        assert model["route_prefix"] is None
        assert model["name"] == MODEL_APP + model["args"]["name"]
