"""The cable between two hosts is taken out: for 5 s it heals, for 60 s training starts again."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from distrec.config import Config
from tests.faults.conftest import ROWS
from tests.faults.rank import FAULT
from tests.faults.test_faults import ALL, STEPS, restarts, supervised, weights
from tests.integration.test_two_hosts import ADDRESSES, PORT, ROOT, Hosts, hosts
from tests.training import make_config

__all__ = ["hosts"]

pytestmark = pytest.mark.skipif(not ALL, reason="one of make faults")


def two_hosts(directory: Path, key: Path) -> Config:
    return make_config(
        directory,
        {
            "train": {"checkpoint_every_steps": 3, "keep_checkpoints": 100},
            "launch": {
                "device": "cpu", "num_ranks": 2, "timeout_seconds": 15, "max_restarts": 6,
                "restart_backoff_seconds": 2.0,
                "hosts": [f"{address}:1" for address in ADDRESSES.values()],
                "network_interfaces": ["eth0"], "ssh_port": PORT, "ssh_identity_file": str(key),
            },
        },
    )  # fmt: skip


def train(config: Config, monkeypatch: pytest.MonkeyPatch, action: str) -> float:
    """`distrec train` on the first host; the seconds that it took."""
    fault = {
        "rank": 0, "point": "backward", "visit": 5, "action": action,
        "done": str(config.directory / "done"),
    }  # fmt: skip
    monkeypatch.setenv(FAULT, json.dumps(fault))
    command = ["ip", "netns", "exec", next(iter(ADDRESSES)), *supervised(config)]
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return time.monotonic() - started


def test_a_cut_network(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert STEPS == 12
    undisturbed = two_hosts(tmp_path / "undisturbed", hosts.key)
    (tmp_path / "undisturbed" / "done").touch()
    usual = train(undisturbed, monkeypatch, "fail")
    for action, least, most in (("cut for 5 s", 0, 0), ("cut for 60 s", 1, 6)):
        config = two_hosts(tmp_path / action.replace(" ", "-"), hosts.key)
        seconds = train(config, monkeypatch, action) - usual
        told = restarts(config)
        assert (config.directory / "done").exists()
        assert least <= len(told) <= most, told
        ROWS.append((f"network {action}", f"{len(told)} restarts", f"+{seconds:.0f} s"))
        assert weights(config) == weights(undisturbed)
