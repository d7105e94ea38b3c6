"""Items that train never saw: the content tower finds those of a user's group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrec.dataset import read_manifest
from distrec.reader import read_items, read_queries
from distrec.scoring.model import open_model
from distrec.sharding.collectives import OneProcess
from distrec.trainer import train
from distrec.world import World
from tests.synthetic import NUM_GROUPS
from tests.training import make_config


@pytest.mark.parametrize("train_rows", ["events", "windows"])
def test_content_finds_new_items_of_the_group_and_cf_none(tmp_path: Path, train_rows: str) -> None:
    found = {}
    for tower in ("cf", "content"):
        model = {"towers": ["cf", tower] if tower != "cf" else ["cf"], "id_dropout": 0.1}
        loop = {"global_batch_size": 60 if train_rows == "events" else 12, "max_epochs": 5}
        config = make_config(
            tmp_path / tower, {"model": model, "train": loop}, train_rows=train_rows
        )
        path = train(config, OneProcess(torch.device("cpu"))).checkpoint
        manifest = read_manifest(config.dataset_directory)
        scoring = open_model(path)
        items = read_items(config.dataset_directory, manifest)
        (queries,) = read_queries(config.dataset_directory, manifest, "test_queries", World(), 99)
        scores = scoring.encode_users(queries.batch) @ scoring.encode_items(items).T
        # the new items are the last ones, one of each group
        new = scores[:, -NUM_GROUPS:]
        groups = [(int(index) - 2) % NUM_GROUPS for index in items.item_index[-NUM_GROUPS:]]
        assert sorted(groups) == list(range(NUM_GROUPS))
        best = torch.tensor(groups)[new.argmax(dim=1)]
        own = (queries.batch.user_index - 2) % NUM_GROUPS
        found[tower] = float((best == own).float().mean())
        assert (new.std(dim=1).max() < 1e-5) == (tower == "cf")
    assert found["content"] > 0.9 > 0.5 > found["cf"]
