"""Who is in a step of private training: drawn by chance, whole, the same on any ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec import columns as c
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import DataError
from distrec.private import SecretNoise, UserReader
from distrec.private.users import UserBatch
from distrec.world import World
from tests.synthetic import write_dataset

NOISE = SecretNoise(b"k" * 32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private-users")
    write_dataset(path)
    return path


def reader(
    directory: Path, rate: float, rank: int = 0, world_size: int = 1, noise: SecretNoise = NOISE
) -> UserReader:
    return UserReader(directory, read_manifest(directory), World(rank, world_size), rate, noise)


def rows(directory: Path, manifest: DatasetManifest) -> list[dict]:
    files = [directory / entry.path for entry in manifest.splits[c.TRAIN].files]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(batch: UserBatch) -> dict[int, Counter[int]]:
    bags = batch.items
    return {
        user: Counter(bags.values[bags.offsets[place] : bags.offsets[place + 1]].tolist())
        for place, user in enumerate(batch.user_index.tolist())
    }


def test_a_user_comes_with_every_event_and_shares_of_one(directory: Path) -> None:
    batch = next(iter(reader(directory, 1.0).batches(0)))
    expected: dict[int, Counter[int]] = {}
    for row in rows(directory, read_manifest(directory)):
        expected.setdefault(row[c.USER_INDEX], Counter())[row[c.ITEM_INDEX]] += 1
    assert contents(batch) == expected
    sums = np.add.reduceat(batch.shares.numpy(), batch.items.offsets[:-1].numpy())
    assert sums == pytest.approx(np.ones(60), abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_together_what_one_has(directory: Path, world_size: int) -> None:
    alone = reader(directory, 0.3)
    ranks = [reader(directory, 0.3, rank, world_size) for rank in range(world_size)]
    whole = [contents(batch) for batch in alone.batches(4)]
    parts = [[contents(batch) for batch in one.batches(4)] for one in ranks]
    assert len(whole) == 4
    for step, expected in enumerate(whole):
        own = [part[step] for part in parts]
        assert sum(map(len, own)) == len(expected)
        assert {user: bag for part in own for user, bag in part.items()} == expected
    planned = {one.rows_planned() for one in (alone, *ranks)}
    assert planned == {sum(map(len, whole))}
    # a resumed epoch is its end
    assert [contents(batch) for batch in alone.batches(4, 2)] == whole[2:]


def test_each_user_is_drawn_in_each_step_by_itself(directory: Path) -> None:
    one = reader(directory, 0.1)
    assert one.steps_per_epoch == 10
    assert one.expected_users == pytest.approx(6.0)
    drawn = np.zeros((1000, 62))
    for epoch in range(100):
        for step, batch in enumerate(one.batches(epoch)):
            drawn[epoch * 10 + step, batch.user_index.numpy()] = 1
    users = drawn[:, c.FIRST_INDEX :]
    assert not drawn[:, : c.FIRST_INDEX].any()
    assert users.mean() == pytest.approx(0.1, abs=0.005)
    # of a thousand draws the standard deviation is .0095
    assert 0.06 < users.mean(axis=0).min() < users.mean(axis=0).max() < 0.14
    # not a fixed number of users: its variance is that of 60 draws, 5.4
    assert users.sum(axis=1).var() == pytest.approx(5.4, rel=0.2)
    steps = users - 0.1
    assert abs((steps[1:] * steps[:-1]).mean()) < 0.003
    assert abs((steps[:, 1:] * steps[:, :-1]).mean()) < 0.003


def test_another_key_draws_other_users(directory: Path) -> None:
    steps = [
        next(iter(reader(directory, 0.5, noise=SecretNoise(key)).batches(0))).user_index.tolist()
        for key in (b"k" * 32, b"l" * 32)
    ]
    assert steps[0] != steps[1]


def write_changed(directory: Path, target: Path, changes: dict[str, list[float]]) -> Path:
    """The first file alone, some columns of its first rows overwritten."""
    manifest = read_manifest(directory)
    entry = manifest.splits[c.TRAIN].files[0]
    table = pq.read_table(directory / entry.path)
    for name, values in changes.items():
        column = table[name].to_pylist()
        column[: len(values)] = values
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(column, table[name].type))
    path = target / entry.path
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    changed = entry.model_copy(update={"num_bytes": path.stat().st_size})
    split = manifest.splits[c.TRAIN].model_copy(
        update={"files": (changed,), "num_rows": entry.num_rows}
    )
    manifest = manifest.model_copy(update={"splits": {**manifest.splits, c.TRAIN: split}})
    (target / "manifest.json").write_text(manifest.model_dump_json())
    return target


def test_whom_nobody_can_tell_apart_and_what_teaches_nothing_is_left_out(
    directory: Path, tmp_path: Path
) -> None:
    """The unknown user, a negative, an event without weight, an item that train does not know."""
    users = [1.0, 2, 2, 2, 2, 2]
    changes = {c.USER_INDEX: users, c.ITEM_INDEX: [5.0, 5, 5, 43, 6, 7],
               c.LABEL: [1.0, 0, 1, 1, 1, 1], c.WEIGHT: [1.0, 1, 0, 1, 3, 1]}  # fmt: skip
    path = write_changed(directory, tmp_path, changes)
    batch = next(iter(reader(path, 1.0).batches(0)))
    found = contents(batch)
    assert 1 not in found
    taken = [row for row in rows(path, read_manifest(path))[6:] if row[c.USER_INDEX] == 2]
    assert found[2] == Counter([6, 7, *(row[c.ITEM_INDEX] for row in taken)])
    place = batch.user_index.tolist().index(2)
    own = slice(int(batch.items.offsets[place]), int(batch.items.offsets[place + 1]))
    pairs = sorted(zip(batch.items.values[own].tolist(), batch.shares[own].tolist(), strict=True))
    # the event of weight 3 among those of weight 1
    assert max(pairs, key=lambda pair: pair[1])[0] == 6
    assert max(share for _, share in pairs) == pytest.approx(3 * min(share for _, share in pairs))


def test_a_user_that_the_tables_do_not_have_is_refused(directory: Path, tmp_path: Path) -> None:
    path = write_changed(directory, tmp_path, {c.USER_INDEX: [62]})
    with pytest.raises(DataError, match=r"user indexes lie in \[0, 62\)\. Received: \d+ to 62"):
        reader(path, 1.0)
