"""deploy/: the command lines of `lmcache server` are accepted, and what has to agree among the files of a deployment agrees."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lmcache
from lmcache.cli.main import build_parser
from lmcache.config.load import load
from lmcache.config.options import GIB
from lmcache.config.server import OPTIONS, ServerConfig
from lmcache.server.preflight import OWN_BYTES
from lmcache.wire.http_client import DEFAULT_URL
from servers import key_file

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CHART, MANIFESTS = DEPLOY / "helm/lmcache", DEPLOY / "kubernetes"
KEY = "/key/key"
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30, "gb": 1 << 30}


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def of_kind(kind: str, *files: str) -> Iterator[dict[str, Any]]:
    for name in files:
        yield from (one for one in documents(MANIFESTS / name) if one["kind"] == kind)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def pods() -> dict[str, dict[str, Any]]:
    """File and name of the DaemonSet or Deployment -> the pods' specification."""
    return {
        f"{path.name} {one['metadata']['name']}": one["spec"]["template"]["spec"]
        for path in sorted(MANIFESTS.glob("*.yaml"))
        for one in documents(path)
        if one["kind"] in ("DaemonSet", "Deployment")
    }


def server_of(pod: dict[str, Any]) -> dict[str, Any]:
    (server,) = (one for one in containers(pod) if one.get("args", [""])[0] == "server")
    return server


def unit(name: str) -> dict[str, str]:
    """The settings of a unit file that stand in it once."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string((DEPLOY / "systemd" / name).read_text())
    return {key: value for section in parser.sections() for key, value in parser.items(section)}


def words(instruction: str) -> list[str]:
    """The words of the one line of the server's Dockerfile that begins so and is in exec form: a list, no shell."""
    (found,) = re.findall(rf"^{instruction}.*? (\[.*\])$", dockerfile(), re.MULTILINE)
    return list(json.loads(found))


def dockerfile() -> str:
    return (DEPLOY / "docker/Dockerfile").read_text()


def chart_arguments() -> list[str]:
    """The server's arguments in the chart with its default values, without those that are there for other values only."""
    template, values = (CHART / "templates/daemonset.yaml").read_text(), documents(CHART / "values.yaml")[0]

    def value(reference: re.Match[str]) -> str:
        found: Any = values
        for name in reference[1].split("."):
            found = found[name]
        return str(found)

    lines = re.findall(r"^ +- (--.*)$", template, re.MULTILINE)
    return [re.sub(r"\{\{ \.Values\.([\w.]+) \}\}", value, one) for one in lines if one != "--insecure-no-auth"]


def command_lines() -> dict[str, list[str]]:
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["server"]
    found = {name: server_of(pod)["args"] for name, pod in pods().items() if "engine.yaml" not in name}
    found["unit"] = shlex.split(unit("lmcache.service")["ExecStart"])[1:]
    found["compose"] = compose["command"]
    found["Dockerfile"] = words("CMD")
    found["chart"] = ["server", *chart_arguments()]
    return found


def settings_of(words: list[str], folder: Path) -> ServerConfig:
    """The configuration that a command line gives. The files that it names are those of deploy/, and a key."""
    names = {"/etc/lmcache/server.yaml": str(DEPLOY / "systemd/server.yaml"), KEY: str(key_file(folder))}
    given = [names.get(text, text) for word in words for text in word.split("=", 1)]
    arguments, unknown = build_parser().parse_known_args(given)
    assert not unknown
    return load({option.name: getattr(arguments, option.name) for option in OPTIONS}, environ={}).config


def size(text: str) -> int:
    number, name = re.fullmatch(r"(\d+)(\w+)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[name]


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


@pytest.mark.parametrize("name", command_lines())
def test_the_server_accepts_the_command_line(name: str, tmp_path: Path) -> None:
    config = settings_of(command_lines()[name], tmp_path)
    assert name == "Dockerfile" or config.l1_size_gb == 20


def test_every_yaml_file_can_be_read() -> None:
    files = [one for one in DEPLOY.rglob("*.yaml") if "templates" not in one.parts]
    assert len(files) > 6
    assert all(documents(one) for one in files)


def test_the_units_folders_and_times_are_those_of_its_settings(tmp_path: Path) -> None:
    service, engine = unit("lmcache.service"), unit("engine.conf")
    config = settings_of(command_lines()["unit"], tmp_path)
    assert config.socket_dir == Path("/run", service["RuntimeDirectory"])
    assert f"/var/lib/{service['StateDirectory']}/" in (DEPLOY / "systemd/server.yaml").read_text()
    assert int(service["TimeoutStopSec"]) > config.drain_seconds
    assert (engine["User"], engine["After"]) == (service["User"], "lmcache.service")
    assert f"\nu {service['User']} " in (DEPLOY / "systemd/lmcache.sysusers").read_text()
    assert not {"DynamicUser", "ProcSubset", "RemoveIPC"} & service.keys()
    assert "AF_NETLINK" in service["RestrictAddressFamilies"].split()


def test_the_image_has_what_the_build_needs_and_runs_as_the_manifests_user() -> None:
    text = dockerfile()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed
    assert all((ROOT / name).exists() for name in sources)
    assert f"COPY {' '.join(copied[0].split())} ./" in (DEPLOY / "docker/Dockerfile.vllm").read_text()
    (user,) = set(re.findall(r"^USER (\d+):\1$", text, re.MULTILINE))
    assert {str(pod["securityContext"]["runAsUser"]) for pod in pods().values()} == {user}
    variables = set(re.findall(r"\b(LMCACHE_SERVER_\w+)=", text))
    assert variables and variables <= {option.env for option in OPTIONS}
    assert words("ENTRYPOINT") == ["lmcache"]
    assert words("HEALTHCHECK")[0] == "lmcache" and build_parser().parse_args(words("HEALTHCHECK")[1:]).verb == "ping"


def test_versions_are_the_packages() -> None:
    chart = documents(CHART / "Chart.yaml")[0]
    tags = {
        tag for one in DEPLOY.rglob("*") if one.is_file() for tag in re.findall(r"lmcache:(\d[\w.]*)", one.read_text())
    }
    assert {chart["version"], chart["appVersion"], *tags} == {lmcache.__version__}


def test_compose_gives_both_what_they_share(tmp_path: Path) -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    server, engine = services["server"], services["vllm"]
    config = settings_of(server["command"], tmp_path)
    assert size(server["shm_size"]) > config.l1_bytes
    assert seconds(server["stop_grace_period"]) > config.drain_seconds
    assert server["user"] == engine["user"]
    (mount,) = (one for one in server["volumes"] if one.startswith("engines:"))
    assert f"{mount}:ro" in engine["volumes"]
    assert config.socket_dir.is_relative_to(mount.partition(":")[2])
    assert f"127.0.0.1:{config.http_port}:{config.http_port}" in server["ports"]
    assert DEFAULT_URL.endswith(f":{config.http_port}")  # what the health check asks
    assert not config.beyond_loopback and engine["network_mode"] == "service:server"


@pytest.mark.parametrize("name", [name for name in pods() if "engine.yaml" not in name])
def test_a_pods_ports_sizes_and_times_are_those_of_its_server(name: str, tmp_path: Path) -> None:
    pod = pods()[name]
    server = server_of(pod)
    config = settings_of(server["args"], tmp_path)
    ports = {one["name"]: one["containerPort"] for one in server["ports"]}
    assert ports["http"] == config.http_port
    assert ports.get("engines", config.port) == config.port and ("engines" in ports) == config.beyond_loopback
    probes = {kind: one["httpGet"] for kind, one in server.items() if kind.endswith("Probe")}
    assert probes["livenessProbe"]["path"] == "/livez"
    assert {one["path"] for one in probes.values()} == {"/livez", "/readyz"}
    assert {one["port"] for one in probes.values()} == {"http"}
    assert pod["terminationGracePeriodSeconds"] > config.drain_seconds
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in server["volumeMounts"]}
    arena = mounts[str(config.arena_dir)]["emptyDir"]
    assert arena["medium"] == "Memory" and size(arena["sizeLimit"]) > config.l1_bytes
    assert size(server["resources"]["limits"]["memory"]) > config.l1_bytes + OWN_BYTES + GIB // 2
    assert any(config.socket_dir.is_relative_to(path) and str(config.socket_dir) != path for path in mounts)
    if config.auth_key_file:
        assert str(Path(KEY).parent) in mounts


@pytest.mark.parametrize("name", pods())
def test_pods_keep_to_the_restricted_level_but_for_the_folder_of_the_node(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {
        "type": "RuntimeDefault"
    }
    for one in containers(pod):
        context = one["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"]["drop"] == ["ALL"]
        if one["name"] == "own-folder":
            assert context["capabilities"]["add"] == ["CHOWN"]
        else:
            assert context["capabilities"].keys() == {"drop"} and context.get("runAsUser", 1)
    with_folder = any("hostPath" in one for one in pod["volumes"])
    assert with_folder == ("sidecar.yaml" not in name)


def test_an_engine_reaches_the_server_of_its_node(tmp_path: Path) -> None:
    server, engine = pods()["server.yaml lmcache"], pods()["engine.yaml vllm"]
    config = settings_of(server_of(server)["args"], tmp_path)
    (service,), (settings,) = of_kind("Service", "server.yaml"), of_kind("ConfigMap", "server.yaml")
    (daemons,), (engines,) = of_kind("DaemonSet", "server.yaml"), of_kind("Deployment", "engine.yaml")
    (policy,), (budget,) = of_kind("NetworkPolicy", "server.yaml"), of_kind("PodDisruptionBudget", "engine.yaml")
    (monitor,) = of_kind("ServiceMonitor", "servicemonitor.yaml")
    labels = daemons["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    assert {one["name"]: one["port"] for one in service["spec"]["ports"]} == {
        "engines": config.port,
        "http": config.http_port,
    }
    connection = json.loads(settings["data"]["kv-transfer-config.json"])["kv_connector_extra_config"]
    where = f"tcp://{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert connection == {"lmcache.mp.host": where, "lmcache.mp.port": config.port}
    (reference,) = (one["valueFrom"] for one in engine["containers"][0]["env"] if "valueFrom" in one)
    assert reference["configMapKeyRef"]["name"] == settings["metadata"]["name"]
    assert reference["configMapKeyRef"]["key"] in settings["data"]

    rules = {rule["ports"][0]["port"]: rule["from"][0] for rule in policy["spec"]["ingress"]}
    assert rules.keys() == {"engines", "http"}
    client = rules["engines"]["podSelector"]["matchLabels"]
    assert client.items() <= engines["spec"]["template"]["metadata"]["labels"].items()
    assert budget["spec"]["selector"] == engines["spec"]["selector"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {one["name"] for one in service["spec"]["ports"]}

    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        assert server["securityContext"][field] == engine["securityContext"][field]
    for name in ("engines", "secret"):
        one, other = ([volume for volume in pod["volumes"] if volume["name"] == name] for pod in (server, engine))
        assert one and one == other
    paths = [
        {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]} for pod in (server, engine)
    ]
    assert paths[0]["engines"] == paths[1]["engines"] and paths[0]["key"] == paths[1]["key"]
    assert {"name": "LMCACHE_AUTH_KEY_FILE", "value": KEY} in engine["containers"][0]["env"]


def test_the_charts_defaults_make_the_servers_of_the_manifests(tmp_path: Path) -> None:
    plain = settings_of(server_of(pods()["server.yaml lmcache"])["args"], tmp_path)
    assert settings_of(["server", *chart_arguments()], tmp_path) == plain


def test_the_charts_schema_knows_exactly_its_values() -> None:
    values = documents(CHART / "values.yaml")[0]
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert schema.keys() - {"global"} == values.keys()
    for name, one in values.items():
        if schema[name].get("additionalProperties") is False:
            assert schema[name]["properties"].keys() == one.keys(), name
    used = set(re.findall(r"\.Values\.(\w+)", "".join(one.read_text() for one in (CHART / "templates").iterdir())))
    assert used == values.keys()
