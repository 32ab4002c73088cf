"""The KubeRay manifests: their fields, the recipe and the command inside them, images, users, resources and probes.

KubeRay's own schema cannot be had offline: the fields it knows (ray.io/v1, as of KubeRay 1.5) are listed here as far as the
manifests use them or nearly did. Pods are checked against Kubernetes' schema where kubernetes-validate is installed.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator
from orchestrator.cli import VERBS
from orchestrator.recipe_file import parse_recipe

ROOT = Path(__file__).parent.parent.parent
FILES = ("storage.yaml", "rayjob.yaml", "rayservice.yaml")
IMAGE = f"ray-orchestrator:{orchestrator.__version__}-cpu"

FIELDS = {
    "RayJob": {"activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus",
               "entrypointNumGpus", "entrypointResources", "jobId", "metadata", "rayClusterSpec", "runtimeEnvYAML",
               "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
               "ttlSecondsAfterFinished"},
    "RayService": {"excludeHeadPodFromServeSvc", "rayClusterConfig", "serveConfigV2", "serveService", "upgradeStrategy"},
    "cluster": {"authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
                "headGroupSpec", "headServiceAnnotations", "rayVersion", "suspend", "workerGroupSpecs"},
    "autoscaler": {"env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
                   "upscalingMode", "version", "volumeMounts"},
    "head": {"enableIngress", "headService", "rayStartParams", "serviceType", "template"},
    "worker": {"groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
               "replicas", "scaleStrategy", "template"},
}  # fmt: skip


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (d for name in FILES for d in documents(name) if d["kind"] == kind)
    return found


def cluster_of(kind: str) -> dict[str, Any]:
    spec = of_kind(kind)["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]
    return cluster


def ray_pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and spec of every pod that runs Ray."""
    for kind in ("RayJob", "RayService"):
        cluster = cluster_of(kind)
        yield f"{kind} head", cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{kind} {group['groupName']}", group["template"]["spec"]


def all_pods() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ray_pods()
    yield "submitter", of_kind("RayJob")["spec"]["submitterPodTemplate"]["spec"]


ray_pod = pytest.mark.parametrize(("name", "pod"), list(ray_pods()), ids=[name for name, _ in ray_pods()])
any_pod = pytest.mark.parametrize(("name", "pod"), list(all_pods()), ids=[name for name, _ in all_pods()])
any_kind = pytest.mark.parametrize("kind", ["RayJob", "RayService"])


# ------------------------------------------------------------------------------------------------------------- schemas


@any_kind
def test_kuberay_knows_every_field(kind: str) -> None:
    manifest, cluster = of_kind(kind), cluster_of(kind)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
    parts = [(kind, manifest["spec"]), ("cluster", cluster), ("autoscaler", cluster.get("autoscalerOptions", {})),
             ("head", cluster["headGroupSpec"]), *(("worker", group) for group in cluster["workerGroupSpecs"])]  # fmt: skip
    for part, values in parts:
        assert not values.keys() - FIELDS[part], part
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@any_pod
def test_kubernetes_takes_every_pod(name: str, pod: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checked"}, "spec": pod}
    validate(manifest, "1.37", strict=True)


@pytest.mark.skipif(not importlib.util.find_spec("kubernetes_validate"), reason="needs kubernetes-validate")
def test_kubernetes_takes_everything_else() -> None:
    from kubernetes_validate import ValidationError, validate

    others = [d for name in FILES for d in documents(name) if d["apiVersion"] == "v1"]
    assert {d["kind"] for d in others} == {"PersistentVolumeClaim", "ConfigMap"}
    for document in others:
        validate(document, "1.37", strict=True)
    with pytest.raises(ValidationError):
        validate(others[0] | {"spek": {}}, "1.37", strict=True)


# ------------------------------------------------------------------------------------------------------ job and recipe


def test_the_job_is_a_verb_and_its_recipe_is_one() -> None:
    """It walks to promote: an endpoint would end with the job's cluster."""
    words = shlex.split(of_kind("RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    room, verb = words[2].split(".")
    assert room == "jobs" and verb in VERBS and (ROOT / "jobs" / f"{verb}.py").is_file()
    folder, file = words[3].rsplit("/", 1)
    recipe = parse_recipe(of_kind("ConfigMap")["data"][file])
    for group in (cluster_of("RayJob")["headGroupSpec"], *cluster_of("RayJob")["workerGroupSpecs"]):
        assert folder in mounted(group["template"]["spec"])
    assert recipe.storage.startswith("/mnt/storage/") and str(recipe.data.source).startswith("/mnt/storage/")


def test_the_recipes_workers_fit_the_jobs_cluster() -> None:
    (text,) = of_kind("ConfigMap")["data"].values()
    (group,) = cluster_of("RayJob")["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    workers = parse_recipe(text).training.workers
    assert isinstance(workers, int) and workers <= cpus * group["replicas"]


def test_job_and_service_speak_of_the_same_storage_and_registry() -> None:
    (text,) = of_kind("ConfigMap")["data"].values()
    recipe = parse_recipe(text)
    (model,) = (a["args"] for a in yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])["applications"]
                if a["name"].startswith("model-"))  # fmt: skip
    assert (model["storage"], model["registry"]) == (recipe.storage, recipe.registry.url)
    assert model["name"] == recipe.name
    assert (recipe.registry.url or "").startswith("postgresql"), "SQLite must not lie on a shared folder"


# ---------------------------------------------------------------------------------------------------------------- pods


@any_kind
def test_ray_is_the_tested_version_and_asks_for_its_token(kind: str) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster_of(kind)["rayVersion"] == pinned
    assert cluster_of(kind)["authOptions"] == {"mode": "token"}


@any_pod
def test_pods_run_our_image_as_an_ordinary_user(name: str, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == 1000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@any_pod
def test_pods_say_what_they_need(name: str, pod: dict[str, Any]) -> None:
    resources = pod["containers"][0]["resources"]
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert resources["limits"]["memory"] == resources["requests"]["memory"], "Ray takes the limit for its own"


@ray_pod
def test_ray_pods_share_the_storage_and_are_asked_for_their_health(name: str, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert "/mnt/storage" in mounted(pod)
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]
              if "persistentVolumeClaim" in volume}  # fmt: skip
    assert claims == {"storage": of_kind("PersistentVolumeClaim")["metadata"]["name"]}
    assert of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    # KubeRay's own readiness probe of a service's worker asks its proxy too: that one must not be replaced.
    assert ("readinessProbe" in container) == (name != "RayService replicas")


def mounted(pod: dict[str, Any]) -> set[str]:
    """Paths at which the pod's first container has volumes; every one of them is declared."""
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"] for mount in mounts} <= {volume["name"] for volume in pod["volumes"]}
    return {mount["mountPath"] for mount in mounts}
