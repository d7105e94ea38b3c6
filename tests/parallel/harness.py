"""Run a function on real Horovod ranks and get back what each rank returned.

``run_ranks(2, "tests.parallel.test_x:body", {"a": 1}, tmp_path)`` starts horovodrun with two ranks
over Gloo on the loopback; each calls ``body(collectives, a=1)`` and returns what JSON can hold. A
launch costs seconds: put many checks into one body.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_SHOWN_CHARACTERS = 8000
# a rank whose peer is gone must give up before the test does
_COLLECTIVE_TIMEOUT_SECONDS = 30


class RanksFailedError(AssertionError):
    """The launch did not end well; the message holds the ranks' output."""


def run_ranks(
    num_ranks: int, target: str, arguments: dict[str, Any], directory: Path, timeout: float = 240
) -> list[Any]:
    """Call a function on every rank of a real horovodrun, one rank included.

    Args:
        num_ranks: Ranks.
        target: ``package.module:function``; the function takes the collectives, then `arguments`.
        arguments: By name; what JSON can hold.
        directory: An existing directory for files of this launch; may be used again.
        timeout: Seconds, after which everything is killed.

    Returns:
        What each rank's function returned, rank 0 first.

    Raises:
        RanksFailedError: A rank failed, did not answer in time, or was not among `num_ranks`.
    """
    folder = directory / f"ranks-{len(list(directory.glob('ranks-*')))}"
    folder.mkdir()
    (folder / "arguments.json").write_text(json.dumps(arguments))
    launcher = Path(sysconfig.get_path("scripts")) / "horovodrun"
    command = [
        str(launcher), "-np", str(num_ranks), "--gloo", "--network-interfaces", "lo",
        sys.executable, "-m", "tests.parallel.harness", target, str(folder),
    ]  # fmt: skip
    log = folder / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
            ending = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, ending = -1, f"no end within {timeout} seconds"
        finally:
            # the launcher takes its ranks with it
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                _reap(process)
    results = [_read(folder / f"rank-{rank}.json") for rank in range(num_ranks)]
    if code != 0 or None in results:
        shown = log.read_text(errors="replace")[-_SHOWN_CHARACTERS:]
        raise RanksFailedError(f"{target} on {num_ranks} ranks: {ending}\n{shown}")
    sizes = [result["world_size"] for result in results if result is not None]
    assert sizes == [num_ranks] * num_ranks, sizes
    return [result["value"] for result in results if result is not None]


def _environment() -> dict[str, str]:
    # a launch from inside a launch is a new world
    outer = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    return {
        **outer,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(_COLLECTIVE_TIMEOUT_SECONDS),
    }


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _run_rank(target: str, folder: Path) -> None:
    """What each rank does."""
    # not at the top: the tests that only call run_ranks need neither
    from distrec.config import LaunchConfig
    from distrec.sharding.collectives import start

    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments = json.loads((folder / "arguments.json").read_text())
    collectives = start(LaunchConfig(device="cpu"), distributed=True)
    value = function(collectives, **arguments)
    world = collectives.world
    answer = {"world_size": world.world_size, "value": value}
    partial = folder / f"rank-{world.rank}.partial"
    partial.write_text(json.dumps(answer))
    partial.rename(folder / f"rank-{world.rank}.json")
    collectives.shutdown()


if __name__ == "__main__":
    try:
        _run_rank(sys.argv[1], Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # a failed rank leaves at once, so that the others do not wait for it
        os._exit(1)
