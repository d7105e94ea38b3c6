"""When the ranks are started again, on which hosts, and what a request to stop is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distrec import errors, launch
from distrec.attempt import Pulses, StopOrder
from distrec.config import Config
from distrec.errors import (
    ConfigError,
    DistrecError,
    RankFailedError,
    RankLostError,
    StoppedError,
    StoreError,
)
from distrec.failure import last_lines
from distrec.trainer.preemption import StopRequest
from tests.training import make_config

SUMMARY = {"steps": 12}


def attempts(
    monkeypatch: pytest.MonkeyPatch, config: Config, outcomes: list[tuple[DistrecError | None, int]]
) -> list[Config]:
    """Let each attempt save a checkpoint of a step (0: none) and fail so; returns their configs."""
    seen: list[Config] = []

    def run_attempt(present: Config, order: StopOrder, is_first: bool) -> dict[str, Any]:
        assert is_first == (not seen)
        seen.append(present)
        error, step = outcomes[len(seen) - 1]
        if step:
            folder = config.checkpoint_directory / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
        if error is not None:
            raise error
        return SUMMARY

    monkeypatch.setattr(launch, "run_attempt", run_attempt)
    return seen


def small(tmp_path: Path, **keys: Any) -> Config:
    keys = {"num_ranks": 2, "restart_backoff_seconds": 0, **keys}
    return make_config(tmp_path, {"launch": keys})


LOST = (RankLostError("gone", 1), 0)
DONE = (None, 0)


def test_restarts_are_counted_anew_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, max_restarts=2)
    seen = attempts(
        monkeypatch, config, [LOST, LOST, (RankFailedError("oh", 0), 5), LOST, LOST, LOST]
    )
    with pytest.raises(RankLostError, match="gone"):
        launch.train_locally(config)
    # two after the start, and two after step 5, whose failure counts as none
    assert len(seen) == 5
    seen = attempts(monkeypatch, config, [LOST, LOST, DONE])
    assert launch.train_locally(config) == {**SUMMARY, "restarts": 2}


@pytest.mark.parametrize(
    "error",
    [
        kind("no")
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, DistrecError)
        and kind not in (RankLostError, RankFailedError, StoreError)
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_tried_again_that_would_fail_again(
    error: DistrecError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path)
    seen = attempts(monkeypatch, config, [(error, 0)])
    with pytest.raises(type(error), match="no"):
        launch.train_locally(config)
    assert len(seen) == 1


def test_a_store_out_of_reach_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts(monkeypatch, small(tmp_path), [(StoreError("no"), 0), DONE])
    assert launch.train_locally(small(tmp_path)) == {**SUMMARY, "restarts": 1}


def test_a_restart_goes_on_from_what_this_job_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tmp_path, {"train": {"resume": False}, "launch": {"restart_backoff_seconds": 0}}
    )
    attempts(monkeypatch, config, [(None, 40)])
    launch.train_locally(config)
    # step 40 is an earlier job's: a restart without a checkpoint of its own begins anew too
    seen = attempts(monkeypatch, config, [LOST, (LOST[0], 3), DONE])
    launch.train_locally(config)
    assert [one.train.resume for one in seen] == [False, False, True]


def test_sigterm_between_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path, restart_backoff_seconds=3600)
    seen = attempts(monkeypatch, config, [LOST])
    monkeypatch.setattr(launch.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="while no rank was running"):
        launch.train_locally(config)
    assert len(seen) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert not config.stop_path.exists()


def test_backoff_doubles_up_to_five_minutes() -> None:
    waits = [launch.backoff_seconds(5, restarts) for restarts in (0, 1, 2, 6, 7, 10_000)]
    assert waits == [5, 10, 20, 300, 300, 300]


def test_fewer_ranks_for_fewer_hosts(tmp_path: Path) -> None:
    hosts = {"num_ranks": 5, "hosts": ["a:2", "b:2", "c:1"], "min_ranks": 3}
    config = make_config(tmp_path, {"launch": hosts})
    left = launch.fewer_ranks(config, {"b"}).launch
    assert (left.hosts, left.num_ranks) == (("a:2", "c:1"), 3)
    # two slots are too few: as it was, and horovodrun says why
    assert launch.fewer_ranks(config, {"a", "c"}) == config
    assert launch.fewer_ranks(config, set()) == config
    with pytest.raises(ConfigError, match="min_ranks is at most num_ranks"):
        make_config(tmp_path, {"launch": {"num_ranks": 2, "min_ranks": 3}})


def test_a_heartbeat_that_stands_still() -> None:
    pulses = Pulses(10)
    beat = {"pid": 7, "time": 1.0}
    assert pulses.stopped({}, 0) is None
    assert pulses.stopped({0: beat, 1: beat}, 100) is None
    assert pulses.stopped({0: {**beat, "time": 2.0}, 1: beat}, 109) is None
    assert pulses.stopped({0: {**beat, "time": 3.0}, 1: beat}, 110.5) == 1
    # a file that cannot be read any more stands still, too
    assert pulses.stopped({1: {**beat, "time": 2.0}}, 121) == 0


def test_a_rank_is_told_to_stop_by_a_file_or_a_signal(tmp_path: Path) -> None:
    by_file = StopRequest(tmp_path / "stop")
    assert not by_file()
    by_file._looked_at = 0.0
    (tmp_path / "stop").touch()
    assert by_file()
    by_signal = StopRequest(tmp_path / "none")
    with by_signal.listening():
        assert not by_signal()
        os.kill(os.getpid(), signal.SIGTERM)
        assert by_signal()


def test_the_last_lines_are_those_of_the_rank(tmp_path: Path) -> None:
    lines = ["horovodrun", *(f"[{n % 2}]<stderr>:line {n}" for n in range(12)), "[1]<stdout>:"]
    (tmp_path / "train.log").write_text("\n".join(lines))
    assert last_lines(tmp_path, 1, 3) == ["line 9", "line 11", ""]
    assert last_lines(tmp_path, None, 2) == ["[1]<stderr>:line 11", "[1]<stdout>:"]
    (tmp_path / "train.log").write_text("one\ntwo\n")
    assert last_lines(tmp_path, 0) == ["one", "two"]
