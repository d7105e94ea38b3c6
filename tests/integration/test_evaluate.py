"""Evaluate on a trained checkpoint: the numbers again from the Parquet files, by other means."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from distrec import columns as c
from distrec import evaluate
from distrec.checkpoint import find, read_checkpoint_manifest
from distrec.config import Config, parse_config
from distrec.dataset import MANIFEST, DatasetManifest, read_manifest
from distrec.errors import CheckpointError, ConfigError, DataError
from distrec.evaluate import QUERIES
from distrec.metrics.candidates import GivenCandidates
from distrec.metrics.names import AMONG_NEW, metric_names
from distrec.metrics.query_ranks import SCHEMA, values_of
from distrec.reader import read_queries
from distrec.sharding.collectives import start
from distrec.trainer import train
from distrec.user_key import hashed
from distrec.world import World
from tests.synthetic import NUM_GROUPS, write_dataset


def make_config(directory: Path, **evaluate_options: Any) -> Config:
    document = {
        "name": "planted",
        "output": str(directory),
        "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
        "model": {"embedding_dim": 8, "autoencoder_hidden": [16], "deep_hidden": [8]},
        "train": {"global_batch_size": 256, "max_epochs": 3, "warmup_steps": 2},
        "evaluate": {
            "ks": [1, 10],
            "batch_size": 64,
            "cold_item_count": 30,
            "cold_user_events": 12,
            **evaluate_options,
        },
        "launch": {"device": "cpu"},
    }
    return parse_config(document, "the test")


def label_held_out(directory: Path, manifest: DatasetManifest) -> None:
    """Held-out examples of another group than the user's become negatives, as they are in train."""
    splits = dict(manifest.splits)
    for split in (c.VALID, c.TEST):
        (entry,) = splits[split].files
        path = directory / entry.path
        table = pq.read_table(path)
        group = (table[c.ITEM_INDEX].to_numpy() - c.FIRST_INDEX) % NUM_GROUPS + c.FIRST_INDEX
        labels = (group == table["user_group"].to_numpy()).astype(np.float32)
        place = table.column_names.index(c.LABEL)
        pq.write_table(table.set_column(place, c.LABEL, pa.array(labels)), path)
        data = path.read_bytes()
        changes = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files = (entry.model_copy(update=changes),)
        splits[split] = splits[split].model_copy(update={"files": files})
    changed = manifest.model_copy(update={"splits": splits})
    (directory / MANIFEST).write_text(changed.model_dump_json())


def train_run(directory: Path, labels: bool) -> Config:
    """A run with planted groups, more users than a batch of queries holds, trained alone."""
    config = make_config(directory)
    manifest = write_dataset(config.dataset_directory, num_users=150, num_items=60, labels=labels)
    if labels:
        label_held_out(config.dataset_directory, manifest)
    train(config, start(config.launch, distributed=False))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return train_run(tmp_path_factory.mktemp("plain"), labels=False)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return train_run(tmp_path_factory.mktemp("labelled"), labels=True)


def read(config: Config, split: str) -> pd.DataFrame:
    files = read_manifest(config.dataset_directory).splits[split].files
    return pd.concat(
        [pd.read_parquet(config.dataset_directory / entry.path) for entry in files],
        ignore_index=True,
    )


def popularity_by_pandas(config: Config, split: str, k: int) -> dict[str, float]:
    """Hit rate, NDCG, coverage and mean count of the k most popular items that are not seen."""
    counts = read(config, c.TRAIN).groupby(c.ITEM_INDEX).size()
    counts = counts.reindex(read(config, c.ITEMS)[c.ITEM_INDEX], fill_value=0)
    order = counts.reset_index(name="count").sort_values(
        ["count", c.ITEM_INDEX], ascending=[False, True]
    )[c.ITEM_INDEX]
    hits, gains, shown = [], [], []
    for query in read(config, split).itertuples():
        allowed = [i for i in order if i in query.targets or i not in set(query.seen)][:k]
        ranks = [rank for rank, item in enumerate(allowed, 1) if item == query.targets[0]]
        hits.append(len(ranks))
        gains.append(sum(1 / np.log2(1 + rank) for rank in ranks))
        shown += allowed
    return {
        f"hr@{k}": float(np.mean(hits)),
        f"ndcg@{k}": float(np.mean(gains)),
        f"coverage@{k}": len(set(shown)) / len(order),
        f"popularity@{k}": float(counts[shown].mean()),
    }


def test_metrics_of_the_model_and_the_baselines(run: Config) -> None:
    summary = evaluate.run(run)
    document = json.loads(run.metrics_path.read_text())
    assert document["dataset_hash"] == read_manifest(run.dataset_directory).content_hash
    assert document["checkpoint"] == find(run.checkpoint_directory).name
    assert document["ks"] == [1, 10]
    for split in ("valid", "test"):
        part = document["splits"][split]
        assert part["num_queries"] == 150
        assert list(part["models"]) == ["distrec", "popularity", "item_knn", "markov"]
        assert part["baselines_fitted_on"] == ["train"]
        values = {name: model["metrics"] for name, model in part["models"].items()}
        expected = popularity_by_pandas(run, f"{split}_queries", 10)
        assert {name: values["popularity"][name] for name in expected} == pytest.approx(expected)
        targets = read(run, f"{split}_queries")[c.TARGETS].str[0]
        num_cold = int((read(run, c.TRAIN).groupby(c.ITEM_INDEX).size()[targets] <= 30).sum())
        assert 0 < num_cold < 150
        cold = part["models"]["item_knn"]["slices"]["cold_items"]
        assert cold["num_targets"] == num_cold
        # whoever sees the groups beats whoever does not
        assert values["item_knn"]["ndcg@10"] > 1.5 * values["popularity"]["ndcg@10"]
        assert values["item_knn"]["diversity@10"] < values["popularity"]["diversity@10"]
        for model in part["models"].values():
            slices = model["slices"]
            assert model["classification"] is None
            for kind in ("users", "items"):
                sizes = [slices[f"{heat}_{kind}"]["num_queries"] for heat in ("cold", "warm")]
                assert sum(sizes) == 150
    test = document["splits"]["test"]["models"]
    assert summary["test"]["item_knn"]["mrr@10"] == pytest.approx(
        test["item_knn"]["metrics"]["mrr@10"], abs=1e-6
    )
    assert not [path for path in run.directory.iterdir() if path.name.startswith(".")]


def mean_of(table: pa.Table, group: str, ks: list[int]) -> dict[str, float]:
    values = values_of(table, group, ks)
    values = values[~np.isnan(values[:, 0, 0])]
    assert not np.isnan(values).any()
    values = values.mean(axis=0) if len(values) else np.zeros(values.shape[1:])
    return dict(zip(metric_names(ks), values.ravel().tolist(), strict=True))


def test_the_metrics_follow_from_the_ranks_of_each_query(run: Config) -> None:
    evaluate.run(run)
    document = json.loads(run.metrics_path.read_text())
    path = run.directory / document["query_ranks"]["path"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == document["query_ranks"]["sha256"]
    ranks = pq.read_table(path)
    assert ranks.schema == SCHEMA
    for split, part in document["splits"].items():
        queries = read(run, f"{split}_queries")
        for name, model in part["models"].items():
            chosen = ranks.filter((pc.field("split") == split) & (pc.field("model") == name))
            assert chosen["query"].to_pylist() == list(range(150))
            assert chosen["user_index"].to_pylist() == queries["user_index"].to_list()
            accuracy = {key: model["metrics"][key] for key in metric_names([1, 10])}
            assert mean_of(chosen, "all", [1, 10]) == pytest.approx(accuracy)
            # ranks are those in the whole catalogue
            del model["slices"][AMONG_NEW]
            for group, inner in model["slices"].items():
                assert mean_of(chosen, group, [1, 10]) == pytest.approx(inner["metrics"])


def test_baselines_learn_from_valid_when_asked(run: Config, tmp_path: Path) -> None:
    options = {"baselines": ["popularity", "markov"], "fit_baselines_on_valid": True}
    config = make_config(run.directory, **options)
    config = config.model_copy(update={"output": str(tmp_path)})
    for name in ("dataset", "checkpoints"):
        (tmp_path / name).symlink_to(run.directory / name)
    evaluate.run(run)
    evaluate.run(config)
    before, after = (json.loads(one.metrics_path.read_text())["splits"] for one in (run, config))
    assert after["test"]["baselines_fitted_on"] == ["train", "valid"]
    assert after["valid"]["baselines_fitted_on"] == ["train"]
    assert before["test"]["queries_hash"] == after["test"]["queries_hash"]
    for split, is_same in (("valid", True), ("test", False)):
        for name in ("popularity", "markov"):
            one, other = (splits[split]["models"][name]["metrics"] for splits in (before, after))
            assert (one == other) == is_same


def test_what_was_recent_is_what_was_before_the_split(tmp_path: Path) -> None:
    """A model of nothing else ranks valid by recent_valid, and test by recent_test."""
    config = make_config(tmp_path, ks=[60], baselines=[])
    names = (*config.model.towers, "bias")
    weights = {"tower_weights": dict.fromkeys(names, 0.0), "recent_weight": 0.5}
    changes = {"model": config.model.model_copy(update=weights)}
    changes["train"] = config.train.model_copy(update={"fit_tower_weights": False, "max_steps": 1})
    config = config.model_copy(update=changes)
    write_dataset(config.dataset_directory, num_users=60)
    train(config, start(config.launch, distributed=False))
    evaluate.run(config)
    splits = json.loads(config.metrics_path.read_text())["splits"]
    items = read(config, c.ITEMS).set_index(c.ITEM_INDEX)
    found = {}
    for split, part in splits.items():
        counts = items[f"recent_{split}"]
        gains = []
        for query in read(config, f"{split}_queries").itertuples():
            ranked = sorted(
                (set(items.index) - set(query.seen)) | set(query.targets),
                key=lambda item: (-counts[item], item),
            )
            gains.append(1 / np.log2(2 + ranked.index(query.targets[0])))
        found[split] = part["models"]["distrec"]["metrics"]["ndcg@60"]
        assert found[split] == pytest.approx(np.mean(gains), abs=1e-6)
    assert (items["recent_valid"] != items["recent_test"]).any()
    trained = read_checkpoint_manifest(find(config.checkpoint_directory)).metrics
    assert trained["ndcg@60"] == pytest.approx(found["valid"])


def test_targets_are_ranked_among_given_candidates(run: Config, tmp_path: Path) -> None:
    queries, items = read(run, c.TEST_QUERIES), read(run, c.ITEMS)
    counts = read(run, c.TRAIN).groupby(c.ITEM_INDEX).size()
    names = dict(zip(items[c.ITEM_INDEX], items[c.ITEM_ID], strict=True))
    users = pd.read_parquet(run.dataset_directory / "vocab" / c.USER_ID).set_index("id")["value"]
    generator = np.random.default_rng(0)
    pairs, gains = [("nobody", "nothing")], []
    for query in queries[:100].itertuples():
        drawn = generator.choice(items[c.ITEM_INDEX], 20, replace=False)
        pairs += [(users[query.user_index], names[item]) for item in drawn]
        ranked = set(drawn) - set(query.seen) | set(query.targets)
        order = sorted(ranked, key=lambda item: (-counts.get(item, 0), item))
        gains.append(1 / np.log2(2 + order.index(query.targets[0])))
    path = tmp_path / "candidates.csv"
    pd.DataFrame(pairs, columns=[c.USER_ID, c.ITEM_ID]).to_csv(path, index=False)
    config = make_config(run.directory, ks=[60], test_candidates=str(path))
    config = config.model_copy(update={"output": str(tmp_path)})
    for name in ("dataset", "checkpoints"):
        (tmp_path / name).symlink_to(run.directory / name)
    evaluate.run(config)
    valid, test = (json.loads(config.metrics_path.read_text())["splits"][n] for n in QUERIES)
    assert (valid["num_queries"], test["num_queries"]) == (150, 100)
    assert valid["candidates"] is None
    found = test["models"]["popularity"]["metrics"]["ndcg@60"]
    assert found == pytest.approx(np.mean(gains))
    assert found > valid["models"]["popularity"]["metrics"]["ndcg@60"]
    for text, message in (("user,item\n1,2\n", "user_id"), ("user_id,item_id\n-,-\n", "none of")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            evaluate.run(config)


def test_candidates_of_hashed_users(run: Config, tmp_path: Path) -> None:
    manifest, key = read_manifest(run.dataset_directory), b"0123456789abcdef"
    directory = tmp_path / "dataset"
    shutil.copytree(run.dataset_directory, directory)
    (vocabulary,) = (directory / "vocab" / c.USER_ID).iterdir()
    table = pq.read_table(vocabulary)
    users = table["value"].to_pylist()
    values = pa.array([hashed(user, key) for user in users])
    pq.write_table(table.set_column(table.column_names.index("value"), "value", values), vocabulary)
    item = read(run, c.ITEMS)[c.ITEM_ID][0]
    path = tmp_path / "candidates.parquet"
    pq.write_table(pa.table({c.USER_ID: [users[3]], c.ITEM_ID: [item]}), path)
    plain = GivenCandidates(path, run.dataset_directory, manifest)
    same = GivenCandidates(path, directory, manifest, key)
    queries = next(read_queries(run.dataset_directory, manifest, c.TEST_QUERIES, World(), 150))
    assert int(plain.restrict(queries).targets.lengths.sum()) == 1
    assert torch.equal(
        same.restrict(queries).targets.lengths, plain.restrict(queries).targets.lengths
    )
    with pytest.raises(DataError, match="none of the 1 pairs"):
        GivenCandidates(path, directory, manifest)


def test_the_model_measures_as_it_did_in_training(
    run: Config, labelled: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    # training looks rows up in its tables, evaluate in the files of the checkpoint, in more parts
    monkeypatch.setattr(evaluate, "_ITEMS_PER_LOOKUP", 7)
    for config in (run, labelled):
        evaluate.run(config)
        trained = read_checkpoint_manifest(find(config.checkpoint_directory)).metrics
        part = json.loads(config.metrics_path.read_text())["splits"]["valid"]["models"]["distrec"]
        ranking = {name: value for name, value in trained.items() if "@" in name}
        assert "ndcg@10" in ranking
        assert {name: part["metrics"][name] for name in ranking} == pytest.approx(ranking)
    values = part["classification"]
    assert values["num_examples"] == 150
    for name in ("log_loss", "calibration", "calibration_error"):
        assert values[name] == pytest.approx(trained[name], rel=1e-5)
    # exact here, from a histogram in training
    assert values["auc"] == pytest.approx(trained["auc"], abs=2e-3)
    assert values["auc"] > 0.6


def test_ratings_measure_as_in_training(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    # scores of pairs are more than inner products
    model = config.model.model_copy(update={"pair_crosses": 1})
    config = config.model_copy(update={"model": model})
    write_dataset(config.dataset_directory, num_users=60, ratings=True)
    train(config, start(config.launch, distributed=False))
    evaluate.run(config)
    trained = read_checkpoint_manifest(find(config.checkpoint_directory)).metrics
    part = json.loads(config.metrics_path.read_text())["splits"]["valid"]["models"]["distrec"]
    assert list(part["classification"]) == ["rmse", "mae", "num_examples"]
    for name in ("rmse", "mae"):
        assert part["classification"][name] == pytest.approx(trained[name], rel=1e-5)


def test_a_share_of_the_baselines_and_other_options(run: Config, tmp_path: Path) -> None:
    options = {"ks": [3], "exclude_seen": False, "baselines": ["popularity"]}
    config = make_config(run.directory, **options)
    config = config.model_copy(update={"output": str(tmp_path)})
    for name in ("dataset", "checkpoints"):
        (tmp_path / name).symlink_to(run.directory / name)
    evaluate.run(config)
    test = json.loads(config.metrics_path.read_text())["splits"]["test"]["models"]
    assert list(test) == ["distrec", "popularity"]
    # everybody gets the same three items
    assert test["popularity"]["metrics"]["coverage@3"] == pytest.approx(3 / 64)


def remove_best(config: Config, manifest: dict[str, Any]) -> None:
    (config.checkpoint_directory / "best.json").unlink()


def break_vocabulary(config: Config, manifest: dict[str, Any]) -> None:
    manifest["vocabularies"]["item_id"]["sha256"] = "0" * 64


def break_queries(config: Config, manifest: dict[str, Any]) -> None:
    manifest["splits"]["test_queries"] = {"num_rows": 0, "files": []}


def break_time(config: Config, manifest: dict[str, Any]) -> None:
    manifest["has_time"] = False


@pytest.mark.parametrize(
    ("breaks", "error", "message"),
    [
        (remove_best, CheckpointError, "Train first"),
        (break_vocabulary, CheckpointError, "differ in vocabulary 'item_id'"),
        (break_queries, DataError, "needs test queries. Received: none"),
        (break_time, ConfigError, r"without times. Take 'markov' out of evaluate.baselines"),
    ],
)
def test_what_cannot_be_measured_leaves_the_old_metrics(
    run: Config, tmp_path: Path, breaks: Any, error: type[Exception], message: str
) -> None:
    shutil.copytree(run.directory, tmp_path / "run")
    config = make_config(tmp_path / "run", baselines=["markov"])
    config.metrics_path.write_text("old")
    path = config.dataset_directory / MANIFEST
    manifest = json.loads(path.read_text())
    breaks(config, manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(error, match=message):
        evaluate.run(config)
    assert config.metrics_path.read_text() == "old"


def test_a_model_that_is_not_finite_is_an_error(run: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        evaluate, "encode_catalogue", lambda *arguments: torch.full((64, 27), float("nan"))
    )
    run.metrics_path.write_text("old")
    with pytest.raises(DataError, match="Received: NaN"):
        evaluate.run(run)
    assert run.metrics_path.read_text() == "old"
