"""Which dataset columns a batch is made of, and of which type each must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distrec import columns as c
from distrec.dataset import FeatureSpec

_STATE = (c.USER_INDEX, c.TIME, c.NUM_EVENTS)
_HISTORIES = (c.HISTORY, c.HISTORY_TIMES)


@dataclass(frozen=True)
class Layout:
    """Columns of one kind of row.

    Args:
        integers: int64 columns.
        floats: float32 columns.
        lists: list<int64> columns.
        dense: Features that stand side by side in the dense matrix, in its order.
        num_event_types: Kinds of event that histories tell apart; 0 where they do not.
    """

    integers: tuple[str, ...]
    floats: tuple[str, ...]
    lists: tuple[str, ...]
    dense: tuple[FeatureSpec, ...]
    num_event_types: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (
            *self.integers,
            *self.floats,
            *self.lists,
            *(feature.column for feature in self.dense),
        )

    @property
    def num_dense(self) -> int:
        """Width of the dense matrix."""
        return sum(feature.dim for feature in self.dense)

    @property
    def types(self) -> dict[str, str]:
        """Column -> the Arrow type it must have, as the manifest spells it."""
        return {
            **dict.fromkeys(self.integers, "int64"),
            **dict.fromkeys(self.floats, "float"),
            **dict.fromkeys(self.lists, "list<int64>"),
            **{
                feature.column: "list<float>" if feature.kind == "vector" else "float"
                for feature in self.dense
            },
        }


def example_layout(
    features: Iterable[FeatureSpec], tasks: Iterable[str] = (), event_types: Sequence[str] = ()
) -> Layout:
    """Columns of train, valid and test, with the labels of further tasks."""
    floats = (c.WEIGHT, c.LABEL, *map(c.task_column, tasks))
    integers = (*_STATE, c.ITEM_INDEX)
    return _layout(features, ("user", "context"), integers, floats, _HISTORIES, event_types)


def query_layout(
    features: Iterable[FeatureSpec], event_types: Sequence[str] = (), *, targets: bool = True
) -> Layout:
    """Columns of valid_queries and test_queries, and without targets of users."""
    lists = (*_HISTORIES, c.SEEN, c.TARGETS) if targets else (*_HISTORIES, c.SEEN)
    return _layout(features, ("user", "context"), _STATE, (), lists, event_types)


def item_layout(features: Iterable[FeatureSpec], recent: str | None = None) -> Layout:
    """Columns of items, with that of what was recent, if one is given."""
    own = (c.ITEM_INDEX, c.COUNT) if recent is None else (c.ITEM_INDEX, c.COUNT, recent)
    return _layout(features, ("item",), own, (), ())


def id_columns(features: Iterable[FeatureSpec], *sides: str) -> tuple[str, ...]:
    """Columns of the features of the given sides that are ids, in the manifest's order."""
    return tuple(f.column for f in features if f.side in sides and not f.is_dense)


def _layout(
    features: Iterable[FeatureSpec],
    sides: tuple[str, ...],
    integers: tuple[str, ...],
    floats: tuple[str, ...],
    lists: tuple[str, ...],
    event_types: Sequence[str] = (),
) -> Layout:
    chosen = [feature for feature in features if feature.side in sides]
    singles = tuple(f.column for f in chosen if f.kind == "categorical")
    several = tuple(f.column for f in chosen if f.has_several_ids)
    types = (c.HISTORY_TYPES,) if event_types else ()
    return Layout(
        integers=(*integers, *singles),
        floats=floats,
        lists=(*lists, *types, *several),
        dense=tuple(f for f in chosen if f.is_dense),
        num_event_types=len(event_types),
    )
