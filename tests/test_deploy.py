"""What `cluster/deploy` ships, held to Ray's own schema, KubeRay's documented fields, bash, and the repository."""

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.jobs import GRACE, read_sweep

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "cluster" / "deploy"


def mapping(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, COUNT, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = mapping(
    ("name", "image", "resources"),
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=TEXT,
    resources=mapping(("requests", "limits"), requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts={"type": "array", "items": mapping(("name", "mountPath"), name=TEXT, mountPath={"pattern": "^/"})},
)
VOLUME = mapping(
    ("name", "persistentVolumeClaim"), name=TEXT, persistentVolumeClaim=mapping(["claimName"], claimName=TEXT)
)
POD = mapping(
    ["spec"],
    spec=mapping(
        ["containers"],
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
    ),
)
HEAD = mapping(("rayStartParams", "template"), rayStartParams=TEXTS, template=POD)
WORKERS = mapping(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=POD,
)  # fmt: skip
RAYJOB = mapping(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=mapping(name=TEXT, generateName=TEXT),
    spec=mapping(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=POD,
        rayClusterSpec=mapping(
            ["headGroupSpec"],
            rayVersion=TEXT,
            authOptions=mapping(["mode"], mode={"enum": ["token", "disabled"]}),
            headGroupSpec=HEAD,
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)
"""The part of KubeRay's RayJob that we use, by the names and types of its API reference (v1.5, v1.6); our own schema,
and stricter than the definition in a cluster, as it knows no other field."""


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((DEPLOY / "cluster.yaml").read_text())


def test_the_rayjob_has_the_form_that_kuberay_documents(rayjob):
    jsonschema.Draft202012Validator.check_schema(RAYJOB)
    jsonschema.validate(rayjob, RAYJOB)


WRONG = [
    (("spec", "shutdownAfterJobFinished"), True),
    (("spec", "backoffLimit"), "2"),
    (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupname"), "workers"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
    (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), []),
    (("apiVersion",), "ray.io/v1alpha"),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=["/".join(map(str, path)) for path, _ in WRONG])
def test_a_rayjob_of_another_form_is_refused(rayjob, path, value):
    wrong = copy.deepcopy(rayjob)
    at = wrong
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAYJOB)


def test_the_rayjob_mounts_what_it_writes_to_and_every_mount_has_its_volume(rayjob):
    spec = rayjob["spec"]["rayClusterSpec"]
    out = Path(sweep_arguments(rayjob["spec"]["entrypoint"])[1]["--out"])
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    images = set()
    for pod in pods:
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert any(out.is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len(images) == 1
    assert spec["rayVersion"] in (DEPLOY / "Dockerfile").read_text()


def sweep_arguments(command):
    """The recipe and the flags of `python -m cluster.cli sweep ...`."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "cluster.cli", "sweep"]
    return words[4], dict(zip(words[5::2], words[6::2], strict=True))


def test_the_rayjob_runs_a_sweep_that_is_there_with_the_grace_that_submit_gives(rayjob):
    recipe, flags = sweep_arguments(rayjob["spec"]["entrypoint"])
    assert read_sweep(recipe, [word for flag in flags.items() for word in flag], "test").sweep.name == recipe
    environment = yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == str(GRACE)
    assert environment["MLFLOW_TRACKING_URI"].startswith("http://")


def test_the_cluster_file_passes_rays_own_checks(cluster):
    filled = prepare_config(copy.deepcopy(cluster))
    validate_config(filled)
    assert filled["head_node_type"] == "head"
    assert filled["available_node_types"]["head"]["resources"] == {"CPU": 0}
    for commands in (filled["head_start_ray_commands"], filled["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in commands[-1]
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**filled, "max_worker": 4})


def test_the_token_that_the_cluster_file_mounts_is_where_ray_looks_for_it(cluster):
    ((there, here),) = cluster["file_mounts"].items()
    assert there == "/home/ray/.ray/auth_token"
    assert here == "~/.ray/auth_token"


def instructions(text):
    """A Dockerfile's instructions with their arguments, comments left out and continued lines joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in kept.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest.strip()


def test_the_dockerfile_copies_all_that_the_package_needs():
    found = list(instructions((DEPLOY / "Dockerfile").read_text()))
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR", "CMD"}
    assert {name for name, _ in found} <= known
    assert next(name for name, _ in found if name != "ARG") == "FROM"
    sources = []
    for name, rest in found:
        if name == "COPY":
            *some, target = [word for word in rest.split() if not word.startswith("--")]
            sources += some
            assert target.startswith("./")
    assert all((ROOT / source).exists() for source in sources)
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*)\]$", project, re.M).group(1)
    assert set(sources) == {"pyproject.toml", "README.md", "LICENSE", *re.findall(r'"(\w+)"', packages)}
    (command,) = [rest for name, rest in found if name == "CMD"]
    assert json.loads(command)[0] == "headway"
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
    torch = re.search(r'"(torch[^"]*)"', project).group(1)
    assert f'"{torch}"' in dict(reversed(found))["RUN"]


DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$")
DIRECTIVES = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "exclusive", "requeue", "output"}


def test_the_batch_script_is_sound_and_slurm_reads_every_directive():
    script = DEPLOY / "sweep.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    marked = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert marked == list(range(1, 1 + len(marked)))  # SLURM stops reading them at the first command
    found = dict(DIRECTIVE.match(lines[number]).groups() for number in marked)
    assert set(found) == DIRECTIVES
    assert found["ntasks-per-node"] == "1"
    assert re.fullmatch(r"\d\d:\d\d:\d\d", found["time"])


def run_batch(tmp_path, *arguments, **variables):
    """The batch script with stand-ins for SLURM's and Ray's commands, which write down what they are asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_ins = {"srun": 'printf "%s\\n" "$@" > "$SAID"', "scontrol": "printf 'node7\\nnode8\\n'", "ray": "true"}
    for name, body in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16", **variables,
    }  # fmt: skip
    command = ["bash", str(DEPLOY / "sweep.sbatch"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_batch_script_starts_one_cluster_and_the_sweep_on_it(tmp_path):
    place = {"MLFLOW_TRACKING_URI": "http://ledger:5000", "HEADWAY_OUT": "/shared/headway"}
    done = run_batch(tmp_path, "width", "--seeds", "16", SLURM_GPUS_ON_NODE="4", **place)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().split("\n")[:-1]
    assert said[:3] == ["--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0"]
    cut = said.index("--")
    assert said[3:cut] == ["ray", "symmetric-run", "--address", "node7:24567", "--min-nodes", "2", "--num-cpus", "16",
                           "--include-dashboard=false", "--num-gpus", "4"]  # fmt: skip
    recipe, flags = sweep_arguments(shlex.join(said[cut + 1 :]))
    assert recipe == "width"
    assert flags == {"--seeds": "16", "--address": "auto", "--out": "/shared/headway"}
    assert read_sweep(recipe, ["--seeds", "16"], "test").sweep.seeds == 16


@pytest.mark.parametrize(
    ("arguments", "variables", "missing"),
    [
        (["width"], {"HEADWAY_OUT": "/shared"}, "MLFLOW_TRACKING_URI"),
        (["width"], {"MLFLOW_TRACKING_URI": "http://x:5000"}, "HEADWAY_OUT"),
        ([], {"MLFLOW_TRACKING_URI": "http://x:5000", "HEADWAY_OUT": "/shared"}, "usage"),
    ],
)
def test_the_batch_script_says_what_it_lacks_before_anything_starts(tmp_path, arguments, variables, missing):
    done = run_batch(tmp_path, *arguments, **variables)
    assert done.returncode != 0
    assert missing in done.stderr
    assert not (tmp_path / "said").exists()


def test_ray_symmetric_run_takes_what_the_batch_script_gives_it():
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    text = (DEPLOY / "sweep.sbatch").read_text()
    asked = ["--address", "node7:24567", "--min-nodes", "2", "--num-cpus", "16", "--include-dashboard=false"]
    assert 'start=(--num-cpus "$SLURM_CPUS_PER_TASK" --include-dashboard=false)' in text
    kept = curate_and_validate_ray_start_args(asked)
    assert kept == ["--num-cpus", "16", "--include-dashboard=false"]


def test_rayignore_stands_where_ray_reads_it_and_keeps_the_packages():
    matches = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    assert len(matches) == 1

    def ignored(name):
        return any(match(ROOT / name) for match in matches)

    for name in (
        "tests/test_deploy.py",
        "headway-out/x/report",
        "mlflow.db",
        ".venv/bin/python",
        "cluster/deploy/Dockerfile",
    ):
        assert ignored(name), name
    for name in ("cluster/cli.py", "cluster/report.html.j2", "sim/box.py", "pyproject.toml", "mine/tests/data.json"):
        assert not ignored(name), name
