"""Our cluster files pass Ray's validator and our lint; each deliberate mistake is found."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from orchestrator.backend import ray_cluster
from orchestrator.cli.main import main
from orchestrator.lint.cluster import lint
from tests.stores import KEYS

ROOT = Path(__file__).resolve().parents[3]
OURS = [
    "cluster.yaml",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "examples/clusters").iterdir()),
]
HEAD = ("available_node_types", "head")
WORKER = ("available_node_types", "spot-l40s")
CONFIG = (*WORKER, "node_config")


def changed(base, key, value):
    # Through JSON: what YAML's anchors share is then one thing each.
    document = json.loads(json.dumps(yaml.safe_load((ROOT / base).read_text())))
    inner = document
    for part in key[:-1]:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    if value is None:
        del inner[key[-1]]
    else:
        inner[key[-1]] = value
    return document


def found_in(document, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return lint(str(path))


@pytest.mark.parametrize("name", OURS)
def test_our_cluster_files_have_nothing_but_an_address_to_fill_in(name):
    found = lint(str(ROOT / name))
    assert [f for f in found if f.level != "note"] == []
    assert len(found) <= 1


@pytest.mark.parametrize("name", [n for n in OURS if "skypilot" not in n])
def test_our_cluster_files_pass_the_validator_of_ray(name):
    assert ray_cluster.schema_refusal(yaml.safe_load((ROOT / name).read_text())) == ""


def test_a_file_of_the_wheel_and_of_the_token_is_where_the_setup_looks_for_it():
    for name in OURS:
        text = (ROOT / name).read_text()
        assert "~/compress-cluster/dist: ./dist" in text
        assert "-c ~/compress-cluster/dist/constraints.txt ~/compress-cluster/dist/*.whl" in text


MISTAKES = {
    "a spot head": (
        "cluster.yaml", (*HEAD, "node_config", "InstanceMarketOptions"), {"MarketType": "spot"},
        "error", "available_node_types.head.node_config", "the head is a spot machine",
    ),
    "work on the head": (
        "cluster.yaml", (*HEAD, "resources", "CPU"), 4,
        "error", "available_node_types.head.resources.CPU", "workers can be placed on the head",
    ),
    "machines that stay": (
        "cluster.yaml", (*WORKER, "min_workers"), 2,
        "error", "available_node_types.spot-l40s.min_workers", "2 machines are paid for",
    ),
    "a worker that cannot start": (
        "cluster.yaml", (*WORKER, "max_workers"), 0,
        "error", "available_node_types.spot-l40s.max_workers", "no machine of this type",
    ),
    "an on-demand worker": (
        "cluster.yaml", (*CONFIG, "InstanceMarketOptions"), None,
        "warning", "available_node_types.spot-l40s.node_config", "on-demand: three",
    ),
    "a persistent request": (
        "cluster.yaml",
        (*CONFIG, "InstanceMarketOptions", "SpotOptions", "SpotInstanceType"), "persistent",
        "error",
        "available_node_types.spot-l40s.node_config.InstanceMarketOptions.SpotOptions.SpotInstanceType",
        "after `ray down`",
    ),
    "a machine that stops": (
        "cluster.yaml",
        (*CONFIG, "InstanceMarketOptions", "SpotOptions", "InstanceInterruptionBehavior"), "stop",
        "error", "available_node_types.spot-l40s.node_config.InstanceMarketOptions.SpotOptions"
        ".InstanceInterruptionBehavior", "keeps its disk",
    ),
    "the first metadata service": (
        "cluster.yaml", (*CONFIG, "MetadataOptions"), None,
        "error", "available_node_types.spot-l40s.node_config.MetadataOptions", "IMDSv1",
    ),
    "no image": (
        "cluster.yaml", (*CONFIG, "ImageId"), None,
        "error", "available_node_types.spot-l40s.node_config.ImageId", "Ubuntu 18.04",
    ),
    "stopped spot machines": (
        "cluster.yaml", ("provider", "cache_stopped_nodes"), True,
        "error", "provider.cache_stopped_nodes", "cannot be stopped",
    ),
    "one zone": (
        "cluster.yaml", ("provider", "availability_zone"), "us-west-2a",
        "warning", "provider.availability_zone", "one zone",
    ),
    "long idle": (
        "cluster.yaml", ("idle_timeout_minutes",), 240,
        "warning", "idle_timeout_minutes", "240 minutes more",
    ),
    "a head type that does not exist": (
        "cluster.yaml", ("head_node_type",), "haed",
        "error", "", "`head_node_type` must be one of",
    ),
    "an open dashboard": (
        "cluster.yaml", ("head_start_ray_commands", 1),
        "RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0",
        "error", "head_start_ray_commands.1", "job API runs any command",
    ),
    "a head without its token": (
        "cluster.yaml", ("head_start_ray_commands", 1), "ray start --head",
        "error", "head_start_ray_commands.1", "without its token",
    ),
    "a worker without its token": (
        "cluster.yaml", ("worker_start_ray_commands", 1), "ray start --address=$RAY_HEAD_IP:6379",
        "error", "worker_start_ray_commands.1", "without its token",
    ),
    "the token turned off": (
        "cluster.yaml", ("setup_commands", 0), "export RAY_AUTH_MODE=disabled",
        "error", "setup_commands.0", "anyone who reaches a port",
    ),
    "no token on the nodes": (
        "cluster.yaml", ("file_mounts",), {"~/compress-cluster/dist": "./dist"},
        "error", "file_mounts", "no token",
    ),
    "open ports": (
        "cluster.yaml", ("provider", "security_group", "IpPermissions", 0),
        {"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]},
        "error", "provider.security_group.IpPermissions.0", "ports 8265-8265 are open",
    ),
    "ssh for the world": (
        "cluster.yaml",
        ("provider", "security_group", "IpPermissions", 0, "IpRanges", 0, "CidrIp"), "0.0.0.0/0",
        "warning", "provider.security_group.IpPermissions.0", "ssh is open",
    ),
    "a second way in": (
        "cluster.yaml", ("head_start_ray_commands", 1),
        "RAY_AUTH_MODE=token ray start --head --ray-client-server-port=10001",
        "warning", "head_start_ray_commands.1", "Ray Client",
    ),
    "a secret": (
        "cluster.yaml", ("setup_commands", 0), "export HF_TOKEN=hf_" + "a" * 34,
        "error", "setup_commands.0", "a secret is written here",
    ),
    "another Ray": (
        "cluster.yaml", ("setup_commands", 0), "pip install 'ray[default]==2.9.0'",
        "error", "setup_commands.0", "installs Ray 2.9.0",
    ),
    "another version of ours": (
        "cluster.yaml", ("setup_commands", 2), "pip install compress-cluster==9.9.9",
        "error", "setup_commands.2", "installs compress-cluster 9.9.9",
    ),
    "an old Python": (
        "cluster.yaml", ("setup_commands", 1), "python3.9 -m venv ~/venv",
        "error", "setup_commands.1", "Python 3.9 is too old",
    ),
    "not installed": (
        "cluster.yaml", ("setup_commands",), ["true"],
        "error", "setup_commands", "no command installs",
    ),
    "versions of the day": (
        "cluster.yaml", ("setup_commands", 2), "pip install ~/compress-cluster/dist/*.whl",
        "warning", "setup_commands", "versions depend on the day",
    ),
    "another Ray in the image": (
        "cluster.yaml", ("docker",),
        {"image": "rayproject/ray:2.40.0-py312-cu128", "container_name": "ray"},
        "error", "docker.image", "contains Ray 2.40.0",
    ),
    "a slow health check": (
        "cluster.yaml", ("head_start_ray_commands", 1),
        "RAY_AUTH_MODE=token ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml",
        "warning", "head_start_ray_commands.1", "after a minute",
    ),
    "no autoscaler": (
        "cluster.yaml", ("head_start_ray_commands", 1), "RAY_AUTH_MODE=token ray start --head",
        "error", "head_start_ray_commands.1", "no autoscaler",
    ),
    "a system config on a worker": (
        "cluster.yaml", ("worker_start_ray_commands", 1),
        "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379 --system-config='{}'",
        "error", "worker_start_ray_commands.1", "only the head",
    ),
    "Ray's default start": (
        "cluster.yaml", ("head_start_ray_commands",), ["ray stop"],
        "error", "head_start_ray_commands", "Ray's defaults start the head",
    ),
    "nothing watches for preemption": (
        "cluster.yaml", ("worker_start_ray_commands",),
        ["RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"],
        "warning", "worker_start_ray_commands", "nothing watches for preemption notices",
    ),
    "what Ray itself refuses": (
        "cluster.yaml", ("max_wokers",), 8, "error", "", "Ray refuses it",
    ),
    "a spot head on GCP": (
        "examples/clusters/gcp.yaml",
        ("available_node_types", "head", "node_config", "scheduling"), [{"preemptible": True}],
        "error", "available_node_types.head.node_config", "the head is a spot machine",
    ),
    "a run on the machine's disk": (
        "examples/clusters/skypilot.yaml", ("envs", "OUT"), "/tmp/run",
        "error", "run", "is lost with it",
    ),
    "a worker without a bucket": (
        "cluster.yaml", (*CONFIG, "IamInstanceProfile"), None,
        "error", "available_node_types.spot-l40s.node_config.IamInstanceProfile",
        "rights to the head only",
    ),
    "a head that cannot start workers": (
        "cluster.yaml", (*HEAD, "node_config", "IamInstanceProfile"), None,
        "error", "available_node_types.head.node_config.IamInstanceProfile",
        "may not pass a role to a worker",
    ),
    "no client of the cloud on the head": (
        "cluster.yaml", ("setup_commands", 2),
        "pip install -c ~/compress-cluster/dist/constraints.txt ~/compress-cluster/dist/*.whl",
        "error", "setup_commands", "needs boto3",
    ),
    "a token for the Hub in a file": (
        "cluster.yaml", ("file_mounts", "~/.cache/huggingface/token"),
        "~/.cache/huggingface/token",
        "warning", "file_mounts.~/.cache/huggingface/token", "would be on every node",
    ),
    "a worker without a bucket on GCP": (
        "examples/clusters/gcp.yaml",
        ("available_node_types", "spot-l4", "node_config", "serviceAccounts"), None,
        "error", "available_node_types.spot-l4.node_config.serviceAccounts",
        "rights to the head only",
    ),
    "a scope that only reads": (
        "examples/clusters/gcp.yaml",
        ("available_node_types", "spot-l4", "node_config", "serviceAccounts", 0, "scopes"),
        ["https://www.googleapis.com/auth/devstorage.read_only"],
        "error", "available_node_types.spot-l4.node_config.serviceAccounts", "no scope lets",
    ),
    "no client of GCP on the head": (
        "examples/clusters/gcp.yaml", ("head_setup_commands",), None,
        "error", "setup_commands", "needs google-api-python-client",
    ),
    "a gated model on SkyPilot": (
        "examples/clusters/skypilot.yaml", ("secrets",), {"WANDB_API_KEY": None},
        "error", "secrets", "llama-2-70b requires a token",
    ),
    "SkyPilot without spot": (
        "examples/clusters/skypilot.yaml", ("resources", "use_spot"), False,
        "warning", "resources.use_spot", "on-demand",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_with_its_line_and_its_fix(name, tmp_path):
    base, key, value, level, path, why = MISTAKES[name]
    found = [f for f in found_in(changed(base, key, value), tmp_path) if why in f.why]
    assert [(f.level, f.path) for f in found] == [(level, path)]
    assert found[0].fix
    line = (tmp_path / "file.yaml").read_text().splitlines()[found[0].line - 1]
    if not path.split(".")[-1].isdigit():
        assert not path or any(f"{part}:" in line for part in path.split("."))


def test_what_the_roles_may_do_is_in_the_account_and_is_what_the_cluster_file_names(
    s3_port, monkeypatch, capsys
):
    boto3 = pytest.importorskip("boto3")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    for bucket in ("first", "second"):  # the same command again sets other rights
        runpy.run_path(str(ROOT / "examples/aws_roles.py"))["main"](bucket)
    assert "its rights are set anew" in capsys.readouterr().out
    iam = boto3.client("iam", region_name="us-east-1")
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    named = {t: each["node_config"]["IamInstanceProfile"]["Name"] for t, each in types.items()}
    actions = {}
    for node_type, name in named.items():
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        policy = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)["PolicyDocument"]
        assert "second" in json.dumps(policy)
        assert "first" not in json.dumps(policy)
        found = [statement["Action"] for statement in policy["Statement"]]
        actions[node_type] = {a for each in found for a in ([each] if type(each) is str else each)}
    run = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"}
    autoscaler = {"ec2:RunInstances", "ec2:TerminateInstances", "iam:PassRole", "ssm:GetParameters"}
    for node_type, allowed in actions.items():
        assert run <= allowed
        assert (autoscaler <= allowed) == (node_type == "head")


def test_the_command_says_where_and_leaves_with_2(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(changed("cluster.yaml", (*WORKER, "min_workers"), 1)))
    with pytest.raises(SystemExit) as left:
        main(["cluster", "lint", str(path)])
    assert left.value.code == 2
    out = capsys.readouterr()
    assert f"error {path}:" in out.out
    assert "fix: min_workers: 0" in out.out
    assert "1 error" in out.err


def test_the_command_is_content_with_our_file(capsys):
    main(["cluster", "lint", str(ROOT / "cluster.yaml"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [f["level"] for f in document["findings"]] == ["note"]


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_what_is_no_cluster_file_is_refused_in_a_line(text, tmp_path, capsys):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["cluster", "lint", str(tmp_path / "f.yaml")])
    assert left.value.code == 2
    assert "ConfigError" in capsys.readouterr().err
