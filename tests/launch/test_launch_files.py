"""What lies in launch/: scripts that bash can read, manifests with the fields they need, and no flag that does not exist."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
MANIFESTS = sorted(FOLDER.glob("*.yaml"))

CONTAINER = {
    "type": "object",
    "required": ["name", "image", "command", "resources"],
    "properties": {"command": {"type": "array", "items": {"type": "string"}, "minItems": 3}},
}
POD = {
    "type": "object",
    "required": ["containers"],
    "properties": {
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "volumes": {"type": "array", "items": {"type": "object", "required": ["name"], "not": {"required": ["hostPath"]}}},
    },
    "not": {"anyOf": [{"required": ["hostNetwork"]}, {"required": ["hostPID"]}]},
}
POD_TEMPLATE = {"type": "object", "required": ["spec"], "properties": {"spec": POD}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "LeaderWorkerSet": {
        "properties": {
            "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
            "spec": {
                "required": ["replicas", "leaderWorkerTemplate"],
                "properties": {
                    "leaderWorkerTemplate": {
                        "required": ["size", "restartPolicy", "leaderTemplate", "workerTemplate"],
                        "properties": {
                            "size": {"type": "integer", "minimum": 2},
                            "restartPolicy": {"enum": ["None", "RecreateGroupOnPodRestart"]},
                            "leaderTemplate": POD_TEMPLATE,
                            "workerTemplate": POD_TEMPLATE,
                        },
                    }
                },
            },
        }
    },
    "JobSet": {
        "properties": {
            "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
            "spec": {
                "required": ["replicatedJobs"],
                "properties": {
                    "replicatedJobs": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "required": ["name", "template"],
                            "properties": {
                                "template": {
                                    "required": ["spec"],
                                    "properties": {"spec": {"required": ["template"], "properties": {"template": POD_TEMPLATE}}},
                                }
                            },
                        },
                    }
                },
            },
        }
    },
    "Service": {"properties": {"apiVersion": {"const": "v1"}, "spec": {"required": ["selector", "ports"]}}},
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def containers(value: Any) -> list[dict[str, Any]]:
    """All containers, wherever they are."""
    if isinstance(value, list):
        return [found for item in value for found in containers(item)]
    if not isinstance(value, dict):
        return []
    return value.get("containers", []) + [found for item in value.values() for found in containers(item)]


@cache
def flags_of(module: str) -> set[str]:
    helped = subprocess.run([sys.executable, "-m", module, "--helpfull"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return set(re.findall(r"^\s+-{1,2}(?:\[no\])?([a-z_0-9]+)", helped.stdout, re.MULTILINE))


def test_everything_in_the_folder_is_checked_here():
    known = {*SCRIPTS, *MANIFESTS, FOLDER / "nginx.conf"}
    assert {path for path in FOLDER.iterdir() if path.is_file()} == known
    assert len(SCRIPTS) >= 2
    assert len(MANIFESTS) >= 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_use_flags_that_exist(path: Path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stderr
    text = path.read_text()
    assert "set -euo pipefail" in text
    module, used = re.search(r"-m (novajax\.\w+)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    names = set(re.findall(r"--([a-z_0-9]+)=", used))
    assert names
    assert names <= flags_of(module)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_their_fields_and_use_flags_that_exist(path: Path):
    for document in documents(path):
        jsonschema.validate(document, {"required": ["apiVersion", "kind", "metadata", "spec"]} | SCHEMAS[document["kind"]])
        for container in containers(document):
            module = container["command"][2]
            names = {argument.removeprefix("--").partition("=")[0] for argument in container["command"][3:]}
            assert names <= flags_of(module)


def test_the_leader_is_asked_whether_it_is_ready_and_secrets_are_references():
    manifest = documents(FOLDER / "leader-worker-set.yaml")[0]
    template = manifest["spec"]["leaderWorkerTemplate"]
    leader, worker = (template[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert leader["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert leader["livenessProbe"]["httpGet"]["path"] == "/health"
    assert "readinessProbe" not in worker
    for container in (leader, worker):
        secret = next(entry for entry in container["env"] if entry["name"] == "NOVAJAX_SECRET")
        assert set(secret["valueFrom"]) == {"secretKeyRef"}
    common = [argument for argument in worker["command"] if argument.startswith(("--model", "--mesh"))]
    assert [argument for argument in leader["command"] if argument.startswith(("--model", "--mesh"))] == common
