"""A rank that does something bad at a chosen point of a run, once, and else is like any other.

Started in place of ``distrec.trainer``. FAULT in the environment is JSON: rank, point, visit
(counted from 1), action, and a file that is made when it is done, so that the rank that is started
after it is a good one.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrec.model import Objective
from distrec.sharding.collectives import HorovodCollectives
from distrec.sharding.dense import DenseGradients
from distrec.trainer import loop
from distrec.trainer.__main__ import main
from distrec.trainer.rank import rank_of_environment
from distrec.trainer.validation import Validator

# the package has a function of the same name
save = importlib.import_module("distrec.checkpoint.save")
FAULT = "DISTREC_TEST_FAULT"

# point -> owner, name of what is called there, whether the fault comes before or after the call
POINTS: dict[str, tuple[Any, str, bool]] = {
    "read": (loop, "prepare_batch", True),
    "forward": (Objective, "loss_sum", True),
    "alltoall": (HorovodCollectives, "start_alltoall", False),
    "backward": (Objective, "loss_sum", False),
    "update": (DenseGradients, "step", True),
    "validation": (Validator, "measure", True),
    "checkpoint write": (save, "_write_own", False),
    "before rename": (save, "_make_room", True),
    "after rename": (save, "_commit", False),
}


def launcher_of(pid: int) -> int:
    """The horovodrun above a rank: the last ancestor that runs it."""
    found = 0
    while pid > 1:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if any(word.endswith("/horovodrun") for word in words):
            found = pid
        pid = parent_of(pid)
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def cut_network(seconds: float) -> None:
    """Take the cable out of the second host; something that outlives this rank puts it back."""
    link = "ip -n distrec-b link set eth0"
    subprocess.run(f"{link} down", shell=True, check=True)
    subprocess.Popen(f"sleep {seconds}; {link} up", shell=True, start_new_session=True)


def stuck() -> None:
    while True:
        time.sleep(1)


def fail() -> None:
    raise RuntimeError("a fault that nobody foresaw")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "ask to stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill horovodrun": lambda: os.kill(launcher_of(os.getpid()), signal.SIGKILL),
    "kill supervisor": lambda: os.kill(parent_of(launcher_of(os.getpid())), signal.SIGKILL),
    "cut for 5 s": lambda: cut_network(5),
    "cut for 60 s": lambda: cut_network(60),
    "fail": fail,
    "be stuck": stuck,
}


def plant(point: str, visit: int, action: str, done: Path) -> None:
    """Wrap what is called at the point."""
    owner, name, is_before = POINTS[point]
    original = getattr(owner, name)
    visits = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal visits
        visits += 1
        is_due = visits == visit and not done.exists()
        if is_due and is_before:
            done.touch()
            ACTIONS[action]()
        result = original(*args, **kwargs)
        if is_due and not is_before:
            done.touch()
            ACTIONS[action]()
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    fault = json.loads(os.environ[FAULT])
    if rank_of_environment() == fault["rank"]:
        plant(fault["point"], fault["visit"], fault["action"], Path(fault["done"]))
    sys.exit(main())
