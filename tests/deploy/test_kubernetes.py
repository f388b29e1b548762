"""Manifests are what Kubernetes and Dask's operator take, and as careful as they say; all of it offline."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from h2mv_dist.config import ClusterSettings, load
from h2mv_dist.jobs.cluster import connect, scheduler_address
from tests.deploy.files import DEPLOY
from tests.deploy.kustomize import Manifest, build

KUBERNETES = DEPLOY / "kubernetes"
JOBS = ["jobs/world", "jobs/train", "jobs/infer", "jobs/append"]
FOLDERS = ["overlays/cpu", "overlays/gpu", *JOBS]
VERSIONS = ["1.27", "1.37"]
"""The oldest Kubernetes with a stable time zone of CronJobs, and the newest that the validator knows."""


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    """The schema of DaskCluster, which allows no unknown field."""
    crd = yaml.load((Path(__file__).parent / "crds" / "daskcluster.yaml").read_text(), yaml.CSafeLoader)
    (version,) = crd["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    strict: dict[str, Any] = _strict(schema)
    return strict


def _strict(schema: Any) -> Any:
    """The same schema, refusing what Kubernetes would drop; ports may be numbers or names."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
    if isinstance(strict.get("properties"), dict) and strict.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def pods(manifest: Manifest) -> Iterator[Manifest]:
    """The pod specifications in a manifest."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "DaskCluster":
        yield from (spec["scheduler"]["spec"], spec["worker"]["spec"])
    elif manifest["kind"] == "Job":
        yield spec["template"]["spec"]
    elif manifest["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]["spec"]


def core(manifest: Manifest) -> Iterator[Manifest]:
    """The manifest, or the core kinds that the operator makes of it."""
    if manifest["kind"] != "DaskCluster":
        yield manifest
        return
    for spec in pods(manifest):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    service = manifest["spec"]["scheduler"]["service"]
    yield {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "service"}, "spec": service}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_core_kinds_are_valid(folder: str, version: str) -> None:
    for manifest in build(KUBERNETES / folder):
        for part in core(manifest):
            kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu"])
def test_the_cluster_is_one_that_the_operator_takes(folder: str, definition: dict[str, Any]) -> None:
    (cluster,) = (m for m in build(KUBERNETES / folder) if m["kind"] == "DaskCluster")
    jsonschema.Draft202012Validator(definition).validate(cluster)


def test_a_misspelt_field_would_be_found(definition: dict[str, Any]) -> None:
    (cluster,) = (m for m in build(KUBERNETES / "overlays/cpu") if m["kind"] == "DaskCluster")
    wrong = deepcopy(cluster)
    wrong["spec"]["worker"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolice"):
        jsonschema.Draft202012Validator(definition).validate(wrong)
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(list(core(wrong))[1], VERSIONS[-1], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_builds_the_same(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], check=True, capture_output=True, text=True
    )
    theirs, ours = list(yaml.safe_load_all(done.stdout)), build(KUBERNETES / folder)
    assert sorted(map(yaml.safe_dump, theirs)) == sorted(map(yaml.safe_dump, ours))


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_may_do_little(folder: str) -> None:
    for manifest in build(KUBERNETES / folder):
        for pod in pods(manifest):
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                _require_careful(container)
                mounts = {mount["name"] for mount in container["volumeMounts"]}
                assert mounts == volumes


def _require_careful(container: Manifest) -> None:
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]
    assert ":" in container["image"].rpartition("/")[2], "an image without a tag"
    assert "command" not in container, "it would replace tini"


def test_nothing_holds_a_secret() -> None:
    for folder in FOLDERS:
        assert all(manifest["kind"] != "Secret" for manifest in build(KUBERNETES / folder))


def test_workers_on_gpus_have_one_each() -> None:
    (cluster,) = (m for m in build(KUBERNETES / "overlays/gpu") if m["kind"] == "DaskCluster")
    (worker,) = cluster["spec"]["worker"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["args"][:3] == ["dask", "cuda", "worker"]


def test_names_that_refer_to_each_other_agree() -> None:
    made = {(m["kind"], m["metadata"]["name"]): m for m in build(KUBERNETES / "overlays/cpu")}
    cluster = made["DaskCluster", "h2mv"]["spec"]
    selector = cluster["scheduler"]["service"]["selector"]
    assert selector == {"dask.org/cluster-name": "h2mv", "dask.org/component": "scheduler"}
    ports = {port["name"] for port in cluster["scheduler"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in cluster["scheduler"]["service"]["ports"]} == ports
    maps = {name for kind, name in made if kind == "ConfigMap"}
    for folder in JOBS:
        (job,) = build(KUBERNETES / folder)
        (pod,) = pods(job)
        sources = [source for c in pod["containers"] for source in c["envFrom"]]
        named = {s["configMapRef"]["name"] for s in sources if "configMapRef" in s}
        named |= {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
        assert named == ({"h2mv-places"} if folder == "jobs/world" else maps)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (2, 1)])
def test_nothing_new_is_a_success_of_the_daily_job(code: int, expected: int, tmp_path: Path) -> None:
    (job,) = build(KUBERNETES / "jobs/append")
    (pod,) = pods(job)
    program = tmp_path / "h2mv-dist"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB": "s3://b/job", "CUBE": "s3://b/cube"}
    done = subprocess.run(pod["containers"][0]["args"], env=environment, check=False)
    assert done.returncode == expected


SETTINGS = (KUBERNETES / "base" / "settings.toml").read_text()
README = (KUBERNETES / "README.md").read_text()
BUCKET = "s3://my-bucket"


def places() -> dict[str, str]:
    """What ``$(NAME)`` in a job's arguments stands for."""
    maps = (m for m in build(KUBERNETES / "overlays/cpu") if m["metadata"]["name"] == "h2mv-places")
    found: dict[str, str] = next(maps)["data"]
    return found


def test_the_first_job_trains_on_the_made_up_world_and_fits_the_cluster() -> None:
    settings = tomllib.loads(SETTINGS)
    assert settings["data"]["url"] == places()["WORLD"]
    (cluster,) = (m for m in build(KUBERNETES / "overlays/cpu") if m["kind"] == "DaskCluster")
    training = settings["training"]
    assert training["ranks"] * len(training["folds"]) == cluster["spec"]["worker"]["replicas"]


def test_what_made_the_first_job_small_can_be_dropped(tmp_path: Path) -> None:
    (script,) = re.findall(r"^sed -i '(.*)' base/settings.toml$", README, re.MULTILINE)
    file = tmp_path / "settings.toml"
    file.write_text(SETTINGS)
    subprocess.run(["sed", "-i", script, str(file)], check=True)
    plain = tmp_path / "plain.toml"
    plain.write_text('data.url = "x"\n')
    (large, _), (usual, _) = load(file), load(plain)
    assert (large.model, large.folds) == (usual.model, usual.folds)
    assert large.training.epochs == usual.training.epochs
    assert large.inference.tile == usual.inference.tile


@pytest.mark.slow
def test_the_first_jobs_make_a_world_folds_and_a_cube(tmp_path: Path) -> None:
    """Their own arguments, with a folder for the bucket and workers of this machine for the cluster's."""
    with connect(ClusterSettings(kind="local", workers=4)) as client:
        file = tmp_path / "settings.toml"
        here = {BUCKET: str(tmp_path), "/scratch": str(tmp_path), "/settings/settings.toml": str(file)}
        here["tcp://h2mv-scheduler:8786"] = scheduler_address(client)
        here |= {f"$({name})": place.replace(BUCKET, str(tmp_path)) for name, place in places().items()}
        file.write_text(_replaced(SETTINGS, here))
        printed = "".join(_run_job(folder, here) for folder in ("jobs/world", "jobs/train", "jobs/infer"))
    for line in ("141 land cells, 2001-01-01..2002-01-01", "trained; checkpoints", "finished; open it with"):
        assert line in printed
        assert line in README


def _run_job(folder: str, here: dict[str, str]) -> str:
    """What the client of a job prints."""
    (job,) = build(KUBERNETES / folder)
    (pod,) = pods(job)
    program, *arguments = pod["containers"][0]["args"]
    assert program == "h2mv-dist"
    command = [sys.executable, "-m", "h2mv_dist.cli", *(_replaced(a, here) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def _replaced(text: str, here: dict[str, str]) -> str:
    for there, place in here.items():
        text = text.replace(there, place)
    return text
