"""The services of ``compose.yaml``, wired as there, as plain processes of this machine."""

import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import free_port
from tests.deploy.files import DEPLOY
from tests.jobs.processes import launch, program, wait_until

FILE = DEPLOY / "docker" / "compose.yaml"
CREDENTIALS = {"S3_KEY": "composekey", "S3_SECRET": "composesecret-canary"}
README = FILE.with_name("README.md")


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
    return found


def test_containers_may_do_little() -> None:
    for name in set(services()) - {"store"}:
        service = services()[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["image"] == "h2mv-dist"


def test_services_depend_on_each_other() -> None:
    for service in services().values():
        assert set(service.get("depends_on", {})) <= set(services())


def test_ports_are_this_machines_alone() -> None:
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


class Natively:
    """Commands and variables of services, with hosts, ports and folders that exist here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store, self.scheduler, self.dashboard = free_port(), free_port(), free_port()
        self.settings = folder / "settings.toml"
        self.settings.write_text(self.here(FILE.with_name("settings.toml").read_text()))

    def here(self, text: str) -> str:
        """A word of the file as it is to be here."""
        for name, value in CREDENTIALS.items():
            text = re.sub(rf"\$\{{{name}:[^}}]*\}}", value, text)
        for service, inside, outside in (
            ("store", 8333, self.store),
            ("scheduler", 8786, self.scheduler),
            ("127.0.0.1", 8787, self.dashboard),
        ):
            text = text.replace(f"//{service}:{inside}", f"//127.0.0.1:{outside}")
        text = text.replace("-ip=store", "-ip=127.0.0.1").replace("0.0.0.0", "127.0.0.1")
        text = re.sub(r"^-s3.port=8333$", f"-s3.port={self.store}", text)
        text = re.sub(r"^:8787$", f"127.0.0.1:{self.dashboard}", text)
        text = re.sub(r"^8786$", str(self.scheduler), text)
        for folder in ("/data", "/scratch"):
            text = re.sub(rf"(^|=){folder}", rf"\g<1>{self.folder}{folder}", text)
        return text.replace("/settings/settings.toml", str(self.settings))

    def command(self, name: str, *arguments: str) -> tuple[str, ...]:
        """What a service runs; ``arguments`` instead of its own command."""
        service = services()[name]
        words = [*service.get("entrypoint", ()), *(arguments or service["command"])]
        words = words[2:] if words[:2] == ["tini", "--"] else words
        found = shutil.which(words[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert found is not None, words[0]
        return (found, *map(self.here, words[1:]))

    def environment(self, name: str) -> dict[str, str]:
        """The variables of a service."""
        return {k: self.here(v) for k, v in services()[name].get("environment", {}).items()}

    def log(self, name: str) -> Path:
        """What a service printed."""
        return self.folder / f"{name}.log"

    def run(self, name: str, *arguments: str) -> str:
        """Run a service to its end and return what it printed."""
        environment = {**self.environment(name), "COLUMNS": "200"}
        done = launch(self.log(name), self.command(name, *arguments), environment)
        try:
            assert done.wait(240) == 0, self.log(name).read_text()[-4000:]
        finally:
            done.kill()
            done.wait()
        return self.log(name).read_text()


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Natively]:
    """Store, scheduler and two workers, up."""
    native = Natively(tmp_path_factory.mktemp("compose"))
    for folder in ("data", "scratch"):
        (native.folder / folder).mkdir()
    # inside a container each of these has its usual port
    own = [f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")]
    own += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"]
    with ExitStack() as stack:
        command = (*native.command("store"), *own)
        store = launch(native.log("store"), command, native.environment("store"))
        stack.callback(store.wait)
        # its own shutdown waits for clients; nothing in the temporary folder is worth that
        stack.callback(store.kill)
        command = (*native.command("scheduler"), "--host", "127.0.0.1")
        stack.enter_context(program(native.log("scheduler"), command, native.environment("scheduler")))
        wait_until(lambda: _healthy(native.store, "healthz"), "the store", native.log("store"))
        wait_until(lambda: _healthy(native.dashboard, "health"), "the scheduler", native.log("scheduler"))
        native.run("bucket")
        for _ in range(services()["worker"]["deploy"]["replicas"]):
            command = (*native.command("worker"), "--host", "127.0.0.1")
            stack.enter_context(program(native.log("worker"), command, native.environment("worker")))
        yield native


def _healthy(port: int, path: str) -> bool:
    assert path in FILE.read_text()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def submissions() -> list[list[str]]:
    """What the README runs with the service ``submit``, in its order."""
    return [
        line.split()[5:]
        for line in README.read_text().splitlines()
        if line.startswith("docker compose run --rm submit")
    ]


@pytest.mark.slow
def test_the_commands_of_the_readme_work_on_the_composed_services(composed: Natively) -> None:
    commands = submissions()
    assert [command[0] for command in commands] == ["world", "train", "infer", "verify-cube"]
    for command in commands:
        printed = composed.run("submit", *command)
    for line in ("141 land cells", "fold-01: done, epoch 3", "finished; open it with", "0 are missing"):
        assert line in printed
        assert line in README.read_text()
    assert not any(CREDENTIALS["S3_SECRET"] in composed.log(name).read_text() for name in services())
