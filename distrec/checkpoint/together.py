"""Do something on every rank, and let all of them know when one has failed.

A rank that raises alone leaves the others waiting in the next exchange for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from distrec import errors
from distrec.errors import DistrecError, TrainingError

if TYPE_CHECKING:
    from distrec.sharding.collectives import Collectives

Result = TypeVar("Result")


def together(name: str, function: Callable[[], Result], collectives: Collectives) -> Result:
    """Call `function` on every rank; when it raises on any, raise on all.

    Collective, and `function` itself must hold no collective that only some ranks reach.

    Args:
        name: Of the exchange.
        function: Does this rank's part.
        collectives: Of the job.

    Returns:
        What `function` returned on this rank.

    Raises:
        DistrecError: Of the class and with the message of the first rank that failed. A rank that
            failed itself raises its own error.
    """
    result: Result | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    told = None if error is None else {"kind": type(error).__name__, "message": str(error)}
    answers = collectives.gather_objects(told, name)
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if answer is not None:
            raise _rebuilt(rank, str(answer["kind"]), str(answer["message"]))
    assert error is None
    return result  # type: ignore[return-value]


def _rebuilt(rank: int, kind: str, message: str) -> DistrecError:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, DistrecError):
        return known(f"rank {rank}: {message}")
    return TrainingError(f"rank {rank} failed: {kind}: {message}")
