"""What a launcher makes of a job of ranks that failed: one error, of the first cause.

The ranks leave records and heartbeats in the run's logs; horovodrun itself always ends with 1, and
may name the wrong rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distrec import errors
from distrec.errors import DistrecError, LaunchError, RankFailedError, RankLostError

TRAIN_LOG = "train.log"
# horovodrun marks every line with the rank it is from
RANK_LINE = re.compile(r"^\[(?P<rank>\d+)\]<(?:stdout|stderr)>:(?P<text>.*)$")
_SIGNALS = {
    134: "SIGABRT",
    135: "SIGBUS",
    137: "SIGKILL, perhaps for want of memory",
    139: "SIGSEGV",
}


def read_records(logs: Path, num_ranks: int) -> dict[int, dict[str, Any]]:
    """How each rank says it ended; a rank that was killed says nothing."""
    return dict(_read_each(logs, "rank-{}.json", num_ranks))


def read_heartbeats(logs: Path, num_ranks: int) -> dict[int, dict[str, Any]]:
    """What each rank was doing last."""
    return dict(_read_each(logs, "heartbeat-{}.json", num_ranks))


def last_lines(logs: Path, rank: int | None, count: int = 5) -> list[str]:
    """The end of what a rank said, or of everything; a rank alone has no mark on its lines."""
    try:
        lines = (logs / TRAIN_LOG).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    matches = [(RANK_LINE.match(line), line) for line in lines if line.strip()]
    if rank is not None and any(match for match, _ in matches):
        own = [match["text"] for match, _ in matches if match and int(match["rank"]) == rank]
        return own[-count:]
    return [line for _, line in matches][-count:]


def _read_each(logs: Path, pattern: str, num_ranks: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(num_ranks):
        try:
            record = json.loads((logs / pattern.format(rank)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            yield rank, record


def explain(
    num_ranks: int,
    code: int,
    exits: Mapping[int, int],
    records: Mapping[int, Mapping[str, Any]],
    heartbeats: Mapping[int, Mapping[str, Any]],
    logs: Path,
) -> DistrecError:
    """The error to raise for a job that failed: the first cause, not what followed from it.

    A rank's own error comes before a rank that ended without a word, which comes before a rank that
    was stuck; that others failed in a collective follows from one of them.

    Args:
        num_ranks: Of the job.
        code: Exit code of the launcher.
        exits: Exit codes of ranks, as far as the launcher told them.
        records: Of the ranks that could still write one.
        heartbeats: What each rank was doing last.
        logs: Where they are.
    """
    failed = {rank: record for rank, record in records.items() if record.get("exit_code") != 0}
    for rank, record in sorted(failed.items()):
        error = _own_error(rank, record)
        if error is not None:
            return error
    where = f"All output is in {logs / TRAIN_LOG}."
    stuck = [record for record in failed.values() if record.get("error") == "Timeout"]
    for record in sorted(stuck, key=lambda record: bool(record.get("waits"))):
        if not record.get("waits"):
            return RankLostError(f"{record['message']}, and was ended. {where}", _rank(record))
    if not records and not heartbeats:
        return RankLostError(
            f"the launcher ended with {code} before any rank had started: {_last_line(logs)} "
            f"{where}"
        )
    silent = [rank for rank in range(num_ranks) if rank not in records]
    if silent and (failed or exits or code):
        return RankLostError(f"{_died(silent, exits, heartbeats, code)} {where}", silent[0])
    if stuck:
        return RankLostError(f"{stuck[0]['message']}. {where}", _rank(stuck[0]))
    for rank, record in failed.items():
        return RankLostError(f"{record.get('message')} {where}", rank)
    return RankLostError(f"the launcher ended with {code}, and no rank says why. {where}")


def _last_line(logs: Path) -> str:
    return "".join(last_lines(logs, None, 1)) or "it said nothing."


def _rank(record: Mapping[str, Any]) -> int | None:
    rank = record.get("rank")
    return rank if isinstance(rank, int) else None


def _own_error(rank: int, record: Mapping[str, Any]) -> DistrecError | None:
    """The rank's error, unless it only says that the other ranks went away."""
    name, message = str(record.get("error")), str(record.get("message"))
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, DistrecError):
        if known is LaunchError and message.startswith("collective "):
            return None
        return known(message)
    if name in ("Timeout", "HorovodInternalError", "KeyboardInterrupt", "SystemExit"):
        return None
    return RankFailedError(f"rank {rank} failed: {name}: {message}", rank)


def _died(
    silent: list[int],
    exits: Mapping[int, int],
    heartbeats: Mapping[int, Mapping[str, Any]],
    code: int,
) -> str:
    parts = []
    for rank in silent:
        status = exits.get(rank, code if len(silent) == 1 and not exits else None)
        how = "" if status is None else f" with exit code {status}"
        if status is not None and (status if status > 0 else 128 - status) in _SIGNALS:
            how += f" ({_SIGNALS[status if status > 0 else 128 - status]})"
        phase = heartbeats.get(rank, {}).get("phase")
        doing = f", last seen at: {phase}" if phase else ", before it had joined the others"
        parts.append(f"rank {rank} died{how}{doing}")
    return "; ".join(parts) + "."
