"""What a launcher makes of a failed job, and the watchdog of a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from distrec import pulse
from distrec.attempt import horovodrun_command
from distrec.errors import ConfigError, DataError, DistrecError, RankFailedError, RankLostError
from distrec.failure import explain
from distrec.trainer.rank import rank_of_environment
from distrec.trainer.watchdog import Watchdog
from tests.training import make_config

LOST: dict[str, Any] = {
    "error": "LaunchError", "exit_code": 6,
    "message": "collective 'train.totals' failed on rank 0 of 2. Likely cause: another rank died.",
}  # fmt: skip
STUCK: dict[str, Any] = {
    "error": "Timeout", "exit_code": 75, "waits": False, "message": "rank 1 was stuck for 5 s in x"
}  # fmt: skip
WAITED: dict[str, Any] = {**STUCK, "waits": True, "message": "rank 0 waited for the others"}


@pytest.mark.parametrize(
    ("exits", "records", "kind", "message"),
    [
        # the error of a rank, whatever followed from it on the others
        (
            {0: 6, 1: 3},
            {0: LOST, 1: {"error": "DataError", "exit_code": 3, "message": "bad file"}},
            DataError,
            "^bad file$",
        ),
        (
            {},
            {0: {"error": "ConfigError", "exit_code": 2, "message": "no"}, 1: LOST},
            ConfigError,
            "^no$",
        ),
        (
            {1: 1},
            {0: LOST, 1: {"error": "KeyError", "exit_code": 1, "message": "'x'"}},
            RankFailedError,
            "^rank 1 failed: KeyError: 'x'$",
        ),
        ({1: 137}, {0: LOST}, RankLostError, r"^rank 1 died with exit code 137 \(SIGKILL.*step 7"),
        ({0: 6}, {0: LOST}, RankLostError, r"^rank 1 died, last seen at: step 7\."),
        ({0: 75}, {0: WAITED, 1: STUCK}, RankLostError, "^rank 1 was stuck for 5 s in x"),
        ({}, {0: WAITED, 1: WAITED}, RankLostError, "^rank 0 waited for the others"),
        ({}, {}, RankLostError, "^rank 0 died, before it had joined the others; rank 1 died, last"),
    ],
)
def test_the_first_cause_is_named(
    exits: dict[int, int],
    records: dict[int, dict[str, Any]],
    kind: type[DistrecError],
    message: str,
) -> None:
    error = explain(2, 1, exits, records, {1: {"phase": "step 7"}}, Path("logs"))
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


def test_the_launcher_stays_on_the_loopback_unless_there_are_hosts(tmp_path: Path) -> None:
    alone = horovodrun_command(make_config(tmp_path, {"launch": {"num_ranks": 3}}))
    assert alone[2:] == ["-np", "3", "--gloo", "--gloo-timeout-seconds", "60",
                         "--network-interfaces", "lo"]  # fmt: skip
    hosts = {"num_ranks": 4, "hosts": ["a:2", "b:2"], "network_interfaces": ["eth0", "eth1"]}
    many = horovodrun_command(make_config(tmp_path, {"launch": hosts}))
    interfaces = ["--network-interfaces", "eth0,eth1"]
    assert many[7:] == ["-H", "a:2,b:2", "--ssh-port", "22", *interfaces]
    hosts |= {"ssh_port": 2222, "ssh_identity_file": "key"}
    keyed = horovodrun_command(make_config(tmp_path, {"launch": hosts}))
    ssh = ["--ssh-port", "2222", "--ssh-identity-file", "key"]
    assert keyed[7:] == ["-H", "a:2,b:2", *ssh, *interfaces]


def test_rank_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank_of_environment() == 0
    monkeypatch.setenv("HOROVOD_RANK", "2")
    assert rank_of_environment() == 2


@pytest.mark.parametrize("waits", [False, True])
def test_the_watchdog_ends_a_rank_that_does_not_move(tmp_path: Path, waits: bool) -> None:
    """In a process of its own, whose main thread sleeps, in a collective or elsewhere."""
    name = "sharding/collectives.py" if waits else "reader.py"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from distrec.trainer.watchdog import Watchdog\n"
        "folder = Path(sys.argv[1])\n"
        "def told(message, waits):\n"
        "    (folder / 'told').write_text(f'{message} {waits}')\n"
        "with Watchdog(1, 0.5, folder, told) as watchdog:\n"
        "    for _ in range(6):\n"
        "        time.sleep(0.2)\n"
        "        watchdog.beat('step 3')\n"
        f"    exec(compile('time.sleep(60)', {name!r}, 'exec'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 75, result.stderr
    doing = "waited for the other ranks" if waits else "was stuck"
    told = (tmp_path / "told").read_text()
    assert told.startswith(f"rank 1 {doing} for ")
    assert told.endswith(f"s in step 3 {waits}")
    assert f'File "{name}", line 1' in result.stderr
    heartbeat = json.loads((tmp_path / "heartbeat-1.json").read_text())
    assert heartbeat["phase"] == "step 3"
    assert (heartbeat["shares"]["exchange"] > 0) == waits
    assert f"rank 1 {doing} for " in (tmp_path / "stacks-1.txt").read_text()


def test_a_rank_waits_as_long_as_another_one_moves(tmp_path: Path) -> None:
    """Twice as long as it may without one; then the other stops, and it is ended."""
    program = (
        "import json, sys, threading, time\n"
        "from pathlib import Path\n"
        "from distrec.trainer.watchdog import Watchdog\n"
        "folder, beats = Path(sys.argv[1]), 0\n"
        "def told(message, waits):\n"
        "    (folder / 'told').write_text(f'{beats} {message}')\n"
        "def move():\n"
        "    global beats\n"
        "    for beats in range(25):\n"
        "        (folder / 'partial').write_text(json.dumps({'beats': beats}))\n"
        "        (folder / 'partial').replace(folder / 'heartbeat-0.json')\n"
        "        time.sleep(0.2)\n"
        "threading.Thread(target=move).start()\n"
        "with Watchdog(1, 2, folder, told):\n"
        "    exec(compile('time.sleep(60)', 'sharding/collectives.py', 'exec'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 75, result.stderr
    assert (tmp_path / "told").read_text().startswith("24 rank 1 waited for the other ranks for ")


def test_beats_of_long_work_count_for_the_thread_that_is_watched(tmp_path: Path) -> None:
    def beats() -> int:
        return int(json.loads((tmp_path / "heartbeat-0.json").read_text())["beats"])

    with Watchdog(0, 60, tmp_path, lambda message, waits: None) as watchdog:
        pulse.beat()
        thread = threading.Thread(target=pulse.beat)
        thread.start()
        thread.join()
    # its own thread, which writes the same file, has ended
    watchdog._write_heartbeat()
    assert beats() == 1
    pulse.beat()
    watchdog._write_heartbeat()
    assert beats() == 1
