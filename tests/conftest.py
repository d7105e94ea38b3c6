"""What all tests may use, and how several processes share them out (pytest-xdist)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.disks import disk
from tests.object_store import object_store

__all__ = ["disk", "object_store"]

# one session of Spark serves all of these
_SPARK = "tests/spark/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spark's tests first: they are the longest piece that one process has to do alone."""
    items.sort(key=lambda item: not item.nodeid.startswith(_SPARK))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file stay together, for they share what was made once; so do all of Spark's."""
    # not at the top: the tests run without it too
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _SPARK if nodeid.startswith(_SPARK) else nodeid.partition("::")[0]

    return Scheduling(config, log)
