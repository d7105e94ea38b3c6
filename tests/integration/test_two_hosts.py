"""Two hosts with addresses of their own, as network namespaces: what one host computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distrec import checkpoint
from distrec.columns import FIRST_INDEX
from distrec.config import Config, dump_config
from tests.training import make_config

ROOT = Path(__file__).parents[2]
PORT = 2222
ADDRESSES = {"distrec-a": "10.77.0.1", "distrec-b": "10.77.0.2"}
STEPS = 8


@dataclass(frozen=True)
class Hosts:
    """Two namespaces joined by a cable, each with an ssh server that takes the key."""

    key: Path


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True)


def lay_cable() -> None:
    """Make the namespaces; their interface is called eth0 in both."""
    for name in ADDRESSES:
        run("ip", "netns", "add", name)
    first, second = ADDRESSES
    run("ip", "link", "add", "eth0", "netns", first, "type", "veth",
        "peer", "name", "eth0", "netns", second)  # fmt: skip
    for name, address in ADDRESSES.items():
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", interface, "up")


def start_ssh(name: str, folder: Path) -> subprocess.Popen[bytes]:
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert sshd is not None
    options = [
        f"Port={PORT}", f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/user.pub",
        f"PidFile={folder}/{name}.pid", "StrictModes=no", "UsePAM=no", "PermitRootLogin=yes",
    ]  # fmt: skip
    arguments = [part for option in options for part in ("-o", option)]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sshd, "-D", "-e", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{name}.log").open("w"),
    )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    for tool in ("ip", "ssh", "ssh-keygen", "sshd"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"two hosts on one machine need {tool} (iproute2, openssh-server)")
    tried = run("ip", "netns", "add", "distrec-try", check=False)
    if tried.returncode != 0:
        pytest.skip(f"this machine forbids network namespaces: {tried.stderr.strip()}")
    run("ip", "netns", "del", "distrec-try")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = []
    try:
        lay_cable()
        servers = [start_ssh(name, folder) for name in ADDRESSES]
        wait_for_ssh(folder)
        yield Hosts(folder / "user")
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=10)
        for name in ADDRESSES:
            run("ip", "netns", "del", name, check=False)


def wait_for_ssh(folder: Path) -> None:
    first, second = ADDRESSES
    command = [
        "ip", "netns", "exec", first, "ssh", "-p", str(PORT), "-i", str(folder / "user"),
        "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
        ADDRESSES[second], "true",
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        result = run(*command, check=False)
        if result.returncode == 0:
            return
        assert time.monotonic() < deadline, result.stderr
        time.sleep(0.2)


def configuration(directory: Path) -> Config:
    return make_config(directory, {"train": {"max_steps": STEPS}, "launch": {"num_ranks": 2}})


def train(config: Config, path: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    """`distrec train` in a process of its own, perhaps inside a namespace."""
    path.write_text(dump_config(config))
    code = "import sys; from distrec.cli import main; sys.exit(main())"
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, "train", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )


def every_row(config: Config) -> dict[str, torch.Tensor]:
    """All table rows of the newest checkpoint, and its dense part."""
    path = checkpoint.find(config.checkpoint_directory, "newest")
    assert path.name == checkpoint.checkpoint_name(STEPS)
    manifest = checkpoint.read_checkpoint_manifest(path)
    rows = {
        name: checkpoint.read_rows(path, name, FIRST_INDEX, table.num_embeddings)
        for name, table in manifest.tables.items()
    }
    return rows | dict(checkpoint.load_model(path).state_dict())


def test_two_hosts_compute_what_one_computes(hosts: Hosts, tmp_path: Path) -> None:
    alone = configuration(tmp_path / "alone")
    result = train(alone, tmp_path / "alone.toml")
    assert result.returncode == 0, result.stderr[-4000:]

    apart = configuration(tmp_path / "apart")
    launch = apart.launch.model_copy(
        update={
            "hosts": tuple(f"{address}:1" for address in ADDRESSES.values()),
            "network_interfaces": ("eth0",),
            "ssh_port": PORT,
            "ssh_identity_file": str(hosts.key),
        }
    )
    apart = apart.model_copy(update={"launch": launch})
    first = next(iter(ADDRESSES))
    result = train(apart, tmp_path / "apart.toml", "ip", "netns", "exec", first)
    assert result.returncode == 0, result.stderr[-4000:]

    expected, received = every_row(alone), every_row(apart)
    assert expected.keys() == received.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, received[name]), name
