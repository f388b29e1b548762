"""The part of kustomize that ``deploy/kubernetes`` uses, to check overlays where there is no kubectl.

Anything else in a ``kustomization.yaml`` is refused; where there is a kubectl, a test compares.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

_KNOWN = {
    *("apiVersion", "kind", "resources", "components", "configMapGenerator", "generatorOptions"),
    *("patches", "images"),
}
Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """The manifests that ``kubectl kustomize`` prints for a folder."""
    wanted = _kustomization(folder)
    found = [manifest for entry in wanted.get("resources", ()) for manifest in _read(folder / entry)]
    found += [_config_map(folder, entry) for entry in wanted.get("configMapGenerator", ())]
    for entry in wanted.get("components", ()):
        _set_images(found, _kustomization(folder / entry))
    for entry in wanted.get("patches", ()):
        _patch(found, entry["target"], yaml.safe_load((folder / entry["path"]).read_text()))
    _set_images(found, wanted)
    return found


def _kustomization(folder: Path) -> Manifest:
    wanted: Manifest = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(wanted) <= _KNOWN, f"{folder}: this builder does not know {set(wanted) - _KNOWN}"
    if "configMapGenerator" in wanted:
        assert wanted["generatorOptions"] == {"disableNameSuffixHash": True}
    return wanted


def _read(path: Path) -> list[Manifest]:
    return build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))


def _config_map(folder: Path, entry: Manifest) -> Manifest:
    data = {file: (folder / file).read_text() for file in entry.get("files", ())}
    for file in entry.get("envs", ()):
        data |= dict(line.split("=", 1) for line in (folder / file).read_text().splitlines())
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def _patch(manifests: list[Manifest], target: Manifest, operations: list[Manifest]) -> None:
    (manifest,) = (
        m for m in manifests if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])
    )
    for operation in operations:
        _apply(manifest, **operation)


def _apply(manifest: Manifest, op: str, path: str, value: Any) -> None:
    """One operation of a JSON patch."""
    *parents, last = path.strip("/").split("/")
    node: Any = manifest
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if isinstance(node, list):
        assert (op, last) == ("add", "-"), f"{op} {path}"
        node.append(deepcopy(value))
    else:
        assert (op == "replace") == (last in node), f"{op} {path}"
        node[last] = deepcopy(value)


def _set_images(node: Any, kustomization: Manifest) -> None:
    """Replace the images of all containers, wherever they are."""
    names = {i["name"]: f"{i['newName']}:{i['newTag']}" for i in kustomization.get("images", ())}
    if isinstance(node, dict):
        for container in node.get("containers", ()):
            container["image"] = names.get(container["image"], container["image"])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _set_images(child, kustomization)
