"""launchers/: the manifests are what KubeRay takes, no secret is in them, the scripts are sound and train."""

import copy
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray import __version__ as ray_version

from qlora_dist.coordinate.report import read_status

REPOSITORY = Path(__file__).parents[2]
LAUNCHERS = REPOSITORY / "launchers"
MANIFESTS = sorted(LAUNCHERS.glob("kuberay-*.yaml"))
BIN = Path(sys.executable).parent
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())


def resources(path: Path) -> list[dict[str, Any]]:
    """The Ray resources of a manifest; others, such as a volume claim, are Kubernetes' own."""
    return [part for part in yaml.safe_load_all(path.read_text()) if part["apiVersion"].startswith("ray.io/")]


def complaints(resource: dict[str, Any]) -> list[str]:
    """What the schema says against a resource, of the kind that it is."""
    validator = Draft202012Validator({**SCHEMA["$defs"][resource["kind"]], "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


def crd_schema(crd: dict[str, Any], version: str) -> dict[str, Any]:
    """The JSON schema of a custom resource's definition, which also refuses what the API server would drop."""

    def strict(part: Any) -> Any:
        if isinstance(part, list):
            return [strict(one) for one in part]
        if not isinstance(part, dict):
            return part
        # Below `properties` keys are names of fields, `properties` and `type` among them.
        made = {
            key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
            for key, value in part.items()
        }
        if made.get("x-kubernetes-int-or-string"):
            return {"type": ["integer", "string"]}
        if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        return made

    (served,) = [one for one in crd["spec"]["versions"] if one["name"] == version]
    schema: dict[str, Any] = strict(served["schema"]["openAPIV3Schema"])
    return schema


# Slow, so that it is no skip of `make test`.
@pytest.mark.slow
@pytest.mark.skipif("QLORA_DIST_KUBERAY_CRDS" not in os.environ, reason="QLORA_DIST_KUBERAY_CRDS names no folder")
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid_by_the_published_crds(path: Path) -> None:
    """For whoever has them: `crds` in KubeRay's Helm chart (`helm pull --untar kuberay/kuberay-operator`)."""
    for resource in resources(path):
        file = Path(os.environ["QLORA_DIST_KUBERAY_CRDS"]) / f"ray.io_{resource['kind'].lower()}s.yaml"
        schema = crd_schema(yaml.safe_load(file.read_text()), resource["apiVersion"].partition("/")[2])
        assert [f"{e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(resource)] == []


def test_a_crd_refuses_what_it_does_not_name() -> None:
    spec = {
        "type": "object", "required": ["replicas"],
        "properties": {
            "replicas": {"type": "integer"}, "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "memory": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
            # A field whose name is a keyword of JSON schema.
            "properties": {"type": "string"},
        },
    }  # fmt: skip
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    crd = {"spec": {"versions": [{"name": "v1alpha1", "schema": {}}, {"name": "v1", "schema": schema}]}}
    validator = Draft202012Validator(crd_schema(crd, "v1"))
    good = {"replicas": 1, "memory": "1Gi", "free": {"any": 1}, "properties": "x"}
    assert validator.is_valid({"spec": good})
    for wrong in ({"replica": 1}, {"replicas": "1"}, {"memory": 1.5}, {"properties": 3}):
        assert not validator.is_valid({"spec": good | wrong}), wrong
    assert not validator.is_valid({"spec": {}})


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of all pods of a resource."""
    spec = resource["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    if "submitterPodTemplate" in spec:
        templates.append(spec["submitterPodTemplate"])
    return [template["spec"] for template in templates]


def test_there_is_a_manifest_of_either_kind() -> None:
    assert sorted(resource["kind"] for path in MANIFESTS for resource in resources(path)) == ["RayCluster", "RayJob"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_only_fields_that_kuberay_knows(path: Path) -> None:
    for resource in resources(path):
        assert complaints(resource) == []


def test_the_schema_refuses_a_misspelt_field_a_wrong_type_and_a_missing_one() -> None:
    (job,) = resources(LAUNCHERS / "kuberay-rayjob.yaml")
    worker = ("rayClusterSpec", "workerGroupSpecs", 0)

    def with_change(where: tuple[str | int, ...], key: str, value: Any) -> list[str]:
        changed = copy.deepcopy(job)
        target: Any = changed["spec"]
        for part in where:
            target = target[part]
        target.pop(key) if value is None else target.__setitem__(key, value)
        return complaints(changed)

    assert with_change((), "backofLimit", 3)
    assert with_change((), "submissionMode", "Http")
    assert with_change((*worker,), "maxReplicas", None)
    assert with_change((*worker,), "replicas", "2")
    assert with_change((*worker, "template", "spec"), "containers", [])
    assert with_change(("rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-cpus", 0), "a number is no string"
    assert with_change((*worker, "template", "spec", "containers", 0, "resources", "limits"), "memory", "256 GB")
    assert with_change((*worker, "template", "spec", "volumes", 1, "emptyDir"), "medium", "Disk")
    assert not with_change((*worker, "template", "spec", "volumes", 1, "emptyDir"), "medium", "HugePages-2Mi")
    assert with_change((), "activeDeadlineSeconds", 0)
    assert not with_change((), "activeDeadlineSeconds", 1)


@pytest.mark.parametrize(("path", "longest"), [("kuberay-rayjob.yaml", 47), ("kuberay-raycluster.yaml", 53)])
def test_the_schema_takes_names_as_the_operator_does(path: str, longest: int) -> None:
    (resource,) = resources(LAUNCHERS / path)
    assert not complaints(resource | {"metadata": {"name": "a" * longest}})
    for metadata in ({"name": "a" * (longest + 1)}, {"name": "1a"}, {"name": "a-"}, {"name": "A"}, {}):
        assert complaints(resource | {"metadata": metadata}), metadata


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_pod_has_the_token_from_a_secret_and_those_of_the_run_share_the_storage(path: Path) -> None:
    for resource in resources(path):
        cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
        # The operator asks the cluster how a job is, and would be refused without the token.
        assert cluster["authOptions"] == {"mode": "token", "secretName": "qlora-dist"}
        for pod in pods(resource):
            (container,) = pod["containers"]
            variables = {variable["name"]: variable for variable in container["env"]}
            assert variables["RAY_AUTH_MODE"]["value"] == "token"
            for name in {"RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY"} & variables.keys():
                assert "value" not in variables[name]
                assert variables[name]["valueFrom"]["secretKeyRef"]["name"] == "qlora-dist"
            assert "RAY_AUTH_TOKEN" in variables
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
            if container["name"] != "submitter":
                assert mounts == {"shared", "shm"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_gpus_asked_for_are_those_of_the_run_and_the_version_is_ours(path: Path) -> None:
    for resource in resources(path):
        cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
        assert cluster["rayVersion"] == ray_version
        (group,) = cluster["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        if resource["kind"] == "RayJob":
            gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
            assert f"launch.num_workers={gpus}" in resource["spec"]["entrypoint"]


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_executable_names_no_secret_and_says_how_to_call_it(path: Path) -> None:
    assert os.access(path, os.X_OK)
    done = subprocess.run([path], capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    told = "/SHARED/OUT.json" if path.name == "ray_bench.sh" else "CONFIG"
    assert f"usage: launchers/{path.name} {told}" in done.stderr
    code = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not re.search(r"TOKEN|API_KEY|SECRET", "\n".join(code)), "they come from the environment, not by a command"


def test_shellcheck_finds_nothing() -> None:
    try:
        done = subprocess.run(
            ["shellcheck", *sorted(LAUNCHERS.glob("*.sh"))], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout


def start(script: str, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """A script with the quickstart's configuration."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [LAUNCHERS / script, REPOSITORY / "configs" / "quickstart.yaml", *overrides],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh", "ray_job.sh"])
def test_a_wrong_setting_is_told_once_and_not_by_each_worker_of_each_attempt(script: str) -> None:
    process = start(script, "train.max_stps=3")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(told.splitlines()) == 1
    assert "train.max_stps is not a setting" in told


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("script", "machines", "variables"),
    [
        ("torchrun.sh", 1, {"NPROC_PER_NODE": "2"}),
        ("torchrun.sh", 2, {"NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}),
        ("accelerate.sh", 1, {"NUM_PROCESSES": "2"}),
    ],
)
def test_two_workers_train_on_one_machine_and_on_what_stands_for_two(
    script: str, machines: int, variables: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        variables = variables | {"MASTER_PORT": str(probe.getsockname()[1])}
    overrides = [
        f"model.name={tiny_model}", f"output_dir={tmp_path / 'run'}", "train.max_steps=2", "train.warmup_steps=0",
        "eval.eval_on_start=false", "eval.sample_prompts=0", "eval.eval_steps=100", "data.max_rows=20",
        "data.max_eval_rows=4", "track.report=false",
    ]  # fmt: skip
    processes = [start(script, *overrides, **variables) for _ in range(machines)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert read_status(tmp_path / "run")["state"] == "finished"
    assert len(read_status(tmp_path / "run")["ranks"]) == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
