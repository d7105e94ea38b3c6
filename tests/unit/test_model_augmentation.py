"""Changed histories: what stays, what moves, and that windows still teach what comes next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distrec.batch import Batch, Jagged
from distrec.config import LossConfig
from distrec.model import Objective
from distrec.model.augmentation import augment
from distrec.sharding.collectives import OneProcess
from tests.unit.test_model import InMemoryTables, make_batch, make_catalogue, make_model

LENGTHS = (10, 0, 1, 7)
COPIES = 200


def long_batch() -> Batch:
    """Each item once in a history, its time ten times its place, and its kind by the item."""
    histories = [list(range(20, 20 + length)) for length in LENGTHS] * COPIES
    size = len(histories)
    batch = make_batch([2] * size, [3] * size, histories)
    times = [[10 * place for place in range(len(history))] for history in histories]
    types = Jagged(kind_of(batch.history.values), batch.history.offsets)
    return replace(batch, history_times=Jagged.from_lists(times), history_types=types)


def kind_of(items: torch.Tensor) -> torch.Tensor:
    return 2 + items % 3


def bags(values: Jagged) -> list[list[int]]:
    return [part.tolist() for part in values.values.split(values.lengths.tolist())]


def test_crop_keeps_one_stretch_with_its_times() -> None:
    torch.manual_seed(0)
    batch = long_batch()
    _, found = augment(batch, ("crop",), 0.3)
    assert torch.equal(found.num_events, batch.num_events)
    assert torch.equal(found.history_types.values, kind_of(found.history.values))
    assert torch.equal(found.history_types.offsets, found.history.offsets)
    starts = set()
    for row, (items, times) in enumerate(
        zip(bags(found.history), bags(found.history_times), strict=True)
    ):
        # 10 - 3, 0, 1 and 7 - 2
        assert len(items) == (7, 0, 1, 5)[row % 4]
        assert items == list(range(items[0], items[0] + len(items))) if items else True
        assert times == [10 * (item - 20) for item in items]
        if row % 4 == 0:
            starts.add(items[0] - 20)
    assert starts == {0, 1, 2, 3}


def test_reorder_moves_the_items_of_one_stretch_and_no_time() -> None:
    torch.manual_seed(0)
    batch = long_batch()
    _, found = augment(batch, ("reorder",), 0.4)
    assert torch.equal(found.history_times.values, batch.history_times.values)
    # an item's kind goes with it
    assert torch.equal(found.history_types.values, kind_of(found.history.values))
    first, last, moved = set(), set(), 0
    for row, items in enumerate(bags(found.history)):
        length = LENGTHS[row % 4]
        assert sorted(items) == list(range(20, 20 + length))
        places = [place for place, item in enumerate(items) if item != 20 + place]
        if length == 10 and places:
            moved += 1
            # four at most
            assert places[-1] - places[0] < 4
            first.add(places[0])
            last.add(places[-1])
    # one in 24 orders is the old one
    assert moved > 0.9 * COPIES
    assert first >= set(range(7))
    assert last >= set(range(3, 10))


def test_a_share_of_the_histories_and_one_change_each() -> None:
    torch.manual_seed(0)
    batch = long_batch()
    _, found = augment(batch, ("crop", "reorder"), 0.5, share=0.6)
    rows = list(zip(bags(batch.history), bags(found.history), strict=True))[::4]
    cropped = sum(len(new) < len(old) for old, new in rows)
    moved = sum(len(new) == len(old) and new != old for old, new in rows)
    assert 40 < cropped < 80
    assert 40 < moved < 80
    # what was cut is in order
    assert all(new == sorted(new) for old, new in rows if len(new) < len(old))
    assert augment(batch, (), 0.5)[1] is batch
    assert augment(batch, ("crop",), 0.5, share=0.0)[1] is batch


def test_substitute_puts_similar_items_in_places_of_some() -> None:
    torch.manual_seed(0)
    batch = long_batch()
    # 20 to 29: a hundred or two hundred above
    similar = torch.arange(40).unsqueeze(1) + torch.tensor([100, 200])
    predicted, seen = augment(batch, ("substitute",), 0.3, similar=similar)
    assert predicted is batch
    assert torch.equal(seen.history.offsets, batch.history.offsets)
    assert torch.equal(seen.history_times.values, batch.history_times.values)
    above = seen.history.values - batch.history.values
    shares = [float((above == shift).to(torch.float32).mean()) for shift in (0, 100, 200)]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.03)
    _, some = augment(batch, ("substitute",), 0.999, share=0.5, similar=similar)
    changed = [row != old for row, old in zip(bags(some.history), bags(batch.history), strict=True)]
    assert 0.4 < sum(changed[::4]) / COPIES < 0.6


def test_what_is_substituted_is_still_predicted() -> None:
    settings = {"augment": ("substitute",), "augment_rate": 0.999, "augment_share": 1.0}
    model = make_model(towers=("autoencoder",), **settings)
    similar = torch.full((10, 1), 6)
    config = LossConfig(kind="softmax")
    objective = Objective(
        model, make_catalogue(), config, 1, "windows", OneProcess(torch.device("cpu")), similar
    )
    batch = make_batch([2], [7], [[2, 3, 4]])
    batch = replace(batch, history_times=Jagged.from_lists([[1, 2, 3]]), time=torch.tensor([9]))
    requests = objective.requests(batch, 0)
    assert requests["user.history_rows"].ids.values.tolist() == [6, 6, 6]
    # places in a catalogue that starts at item 2
    assert objective._inputs(batch).targets.places.tolist() == [0, 1, 2, 5]


def test_windows_teach_what_comes_next_in_the_changed_history() -> None:
    settings = {"augment": ("crop",), "augment_rate": 0.5, "augment_share": 1.0}
    model = make_model(towers=("autoencoder",), **settings)
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax"), 1, "windows")
    torch.manual_seed(0)
    batch = make_batch([2], [7], [[2, 3, 4, 5]])
    batch = replace(batch, history_times=Jagged.from_lists([[1, 2, 3, 4]]), time=torch.tensor([9]))
    requests = objective.requests(batch, 0)
    seen = requests["user.history_rows"].ids.values.tolist()
    assert len(seen) == 2
    assert seen[1] == seen[0] + 1
    # of a window that is cut its first event is no target: the second, and the example's own
    assert objective.weight_sum(batch) == 2
    loss = objective.loss_sum(batch, InMemoryTables(model)(requests), 0)[0]
    assert loss.isfinite()
    model.eval()
    other = replace(batch)
    assert len(objective.requests(other, 0)["user.history_rows"].ids.values) == 4
    assert objective.weight_sum(other) == 5


def test_events_keep_their_target() -> None:
    model = make_model(towers=("autoencoder",), augment=("crop",), augment_share=1.0)
    objective = Objective(model, make_catalogue(), LossConfig(kind="softmax"), 1)
    batch = make_batch([2, 3], [7, 4], [[2, 3, 4, 5], [6]])
    requests = objective.requests(batch, 0)
    assert requests["user.history"].ids.lengths.tolist() == [3, 1]
    assert objective.weight_sum(batch) == 3.0
