"""Scoring as a whole: a dataset, a real checkpoint and Spark, against a plain look at all pairs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import SparkSession

from distrec import columns as c
from distrec import pipeline, scoring
from distrec.batch import Batch, Jagged
from distrec.checkpoint import Identity, Parts, Position, mark_best, publish_checkpoints, save
from distrec.config import Config, ModelConfig, ShardingConfig, parse_config
from distrec.dataset import DatasetManifest, read_manifest
from distrec.errors import CheckpointError, DataError
from distrec.files import sha256
from distrec.job import execute
from distrec.model import ModelSpec, UnifiedModel
from distrec.reader import read_items, read_queries
from distrec.sharding.collectives import OneProcess
from distrec.sharding.plan import plan_tables
from distrec.sharding.tables import EmbeddingTables
from distrec.store import DATASET, SCORES, open_output, publish
from distrec.world import World
from tests.bad_inputs.case import snapshot
from tests.disks import Disk, fill
from tests.object_store import ObjectStore
from tests.synthetic import write_dataset

NUM_USERS, NUM_ITEMS, K = 60, 44, 7
# spread the scores of an untrained model
SHARDING = ShardingConfig(init_scale=1.0)
MODEL = ModelConfig(embedding_dim=8, feature_dim=4, autoencoder_hidden=(8,), deep_hidden=(8,))
TOWERS = ("cf", "autoencoder", "sequence", "deep")
CPU = torch.device("cpu")


class Run:
    """A run's directory with a dataset and a checkpoint, and the live model beside it."""

    def __init__(self, directory: Path, model: ModelConfig = MODEL, **dataset: Any) -> None:
        self.directory = directory
        self.dataset = directory / "dataset"
        write_dataset(self.dataset, num_users=NUM_USERS, **dataset)
        self.manifest = read_manifest(self.dataset)
        torch.manual_seed(3)
        self.model = UnifiedModel(ModelSpec.from_manifest(self.manifest), model)
        with torch.no_grad():
            # off their neutral starts, so that every part shows in the scores
            for gate in (self.model.user_gate, self.model.item_gate):
                gate.output.weight.normal_(std=0.2)
            deep = self.model.towers["deep"]
            for network in (deep.user_network, deep.item_network):
                network.layers[-1].weight.normal_()
            self.model.global_bias.fill_(0.25)
            self.model.recent_weight.fill_(0.7)
            if "sequence" in model.towers:
                self.model.towers["sequence"].kinds.normal_()
        collectives = OneProcess(CPU)
        plans = plan_tables(self.model.table_specs(), SHARDING, 1)
        self.tables = EmbeddingTables(plans, collectives, SHARDING, 5, CPU)
        identity = Identity(
            seed=1,
            config={"model": model.model_dump(mode="json")},
            config_hash="test",
            dataset_hash=self.manifest.content_hash,
            vocabularies={name: v.sha256 for name, v in self.manifest.vocabularies.items()},
            model_spec=self.model.spec,
        )
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.checkpoint = save(
            directory / "checkpoints",
            identity,
            Position(global_step=12, epoch=0, step_in_epoch=12, lanes=1),
            Parts(self.model, optimizer, self.tables, plans, SHARDING),
            collectives,
        )
        mark_best(self.checkpoint, "ndcg@10", 0.5)

    def config(self, **score: object) -> Config:
        document = {
            "name": "scored",
            "output": str(self.directory),
            "prepare": {"events": {"paths": ["none.csv"], "time": "time"}},
            "score": {"k": K, "user_block": 16, "item_block": 10, **score},
        }
        return parse_config(document, "test")

    def shares(self, batch: Batch) -> np.ndarray:
        """Straight from the model and the live tables: float32, (B, M, T + 1)."""
        items = read_items(self.dataset, self.manifest, c.USERS)
        self.model.eval()
        with torch.no_grad():
            users = self.model.encode_users(batch, self.tables(self.model.user_requests(batch)))
            vectors = self.model.encode_items(items, self.tables(self.model.item_requests(items)))
            return self.model.tower_scores(users.unsqueeze(1), vectors.unsqueeze(0)).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With the tower that reads of which kind events were."""
    model = MODEL.model_copy(update={"towers": TOWERS, "sequence_layers": 1})
    directory = tmp_path_factory.mktemp("scored für alle")
    return Run(directory, model, event_types=("view", "buy"))


def test_a_model_of_several_tasks_gives_each_items_probabilities(
    spark: SparkSession, tmp_path: Path
) -> None:
    several = MODEL.model_copy(update={"multi_task": "mmoe", "expert_hidden": (8,)})
    run = Run(tmp_path, several, labels=True, tasks=True)
    config = run.config()
    scoring.run(spark, config)
    found = read_scores(config)
    users = next(read_queries(run.dataset, run.manifest, c.USERS, World(), NUM_USERS)).batch
    items = read_items(run.dataset, run.manifest, c.USERS)
    run.model.eval()
    with torch.no_grad():
        vectors = run.model.encode_users(users, run.tables(run.model.user_requests(users)))
        of_items = run.model.encode_items(items, run.tables(run.model.item_requests(items)))
        for index, vector in zip(users.user_index.tolist(), vectors, strict=True):
            rows = found[f"u{index - c.FIRST_INDEX}"]
            assert len(rows) == K
            places = [int(row[c.ITEM_ID].removeprefix("i")) - c.FIRST_INDEX for row in rows]
            pairs = vector.expand(K, -1), of_items[places]
            expected = torch.sigmoid(run.model.task_scores(*pairs)).numpy()
            told = [dict(row[c.PROBABILITIES]) for row in rows]
            assert [list(one) for one in told] == [["label", "like"]] * K
            values = [list(one.values()) for one in told]
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def read_scores(config: Config) -> dict[str, list[dict]]:
    """Rows of each user by rank, from the files that the manifest names."""
    directory = config.scores_directory
    manifest = json.loads((directory / "manifest.json").read_text())
    rows: dict[str, list[dict]] = {}
    for entry in manifest["files"]:
        table = pq.read_table(directory / entry["path"])
        assert table.num_rows == entry["num_rows"]
        for row in table.to_pylist():
            rows.setdefault(row[c.USER_ID], []).append(row)
    return {user: sorted(own, key=lambda row: row[c.RANK]) for user, own in rows.items()}


def check_user(rows: list[dict], shares: np.ndarray, masked: Iterable[int], k: int = K) -> None:
    """One user's rows against the shares (M, T + 1) of all items; masked are item indexes."""
    scores = shares.sum(axis=1).astype(np.float64)
    scores[[index - c.FIRST_INDEX for index in masked]] = -np.inf
    best = np.sort(scores)[::-1][: min(k, int(np.isfinite(scores).sum()))]
    assert [row[c.RANK] for row in rows] == list(range(1, len(best) + 1))
    columns = [int(row[c.ITEM_ID].removeprefix("i")) - c.FIRST_INDEX for row in rows]
    assert len(set(columns)) == len(columns)
    given = [row[c.SCORE] for row in rows]
    assert given == sorted(given, reverse=True)
    # items whose scores differ in the last bits may change places
    np.testing.assert_allclose(scores[columns], best, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(given, best, rtol=1e-4, atol=1e-5)
    for row, column in zip(rows, columns, strict=True):
        reasons = dict(row[c.REASONS])
        assert list(reasons) == [*TOWERS, "bias"]
        np.testing.assert_allclose(list(reasons.values()), shares[column], rtol=1e-4, atol=1e-5)
        assert sum(reasons.values()) == pytest.approx(row[c.SCORE], abs=1e-5)


def known_users(run: Run) -> tuple[list[str], list[list[int]], np.ndarray]:
    """Ids, seen items and shares of all users of the dataset."""
    table = pq.read_table(run.dataset / "users" / "part-00000.parquet")
    (queries,) = read_queries(run.dataset, run.manifest, c.USERS, World(), NUM_USERS)
    return table[c.USER_ID].to_pylist(), table[c.SEEN].to_pylist(), run.shares(queries.batch)


def test_every_user_gets_what_the_model_says(spark: SparkSession, run: Run) -> None:
    config = run.config()
    manifest = scoring.run(spark, config)
    digits = manifest.model_version.removeprefix("step-00000012-")
    assert len(digits) == 8
    assert (manifest.num_users, manifest.num_rows, manifest.k) == (NUM_USERS, NUM_USERS * K, K)
    assert manifest.dataset_hash == run.manifest.content_hash
    rows = read_scores(config)
    ids, seen, shares = known_users(run)
    assert sorted(rows) == sorted(ids)
    for user, own, share in zip(ids, seen, shares, strict=True):
        check_user(rows[user], share, own)
        assert {row[c.MODEL_VERSION] for row in rows[user]} == {manifest.model_version}
    # what an analyst reads the directory with
    frame = spark.read.parquet(str(config.scores_directory / "top_k"))
    assert frame.count() == NUM_USERS * K
    assert dict(frame.dtypes)[c.REASONS] == "map<string,float>"
    assert not list(config.directory.glob(".scores-*"))


def test_a_host_with_nothing_but_the_store_scores(
    spark: SparkSession, run: Run, object_store: ObjectStore, tmp_path: Path
) -> None:
    """Spark reads and writes the run's directory; the store is none of its business."""
    document = {**run.config().model_dump(mode="json"), "store": object_store.url(tmp_path.name)}
    here = parse_config(document, "test")
    publish(here, DATASET, run.dataset, run.manifest.all_files())
    publish_checkpoints(here, OneProcess(CPU))
    there = parse_config({**document, "output": str(tmp_path / "there")}, "test")
    assert execute("score", there, pipeline.score, print_line=False) == 0
    assert {len(rows) for rows in read_scores(there).values()} == {K}
    folder = open_output(there, SCORES).current().versions[SCORES].folder
    assert object_store.objects(f"{tmp_path.name}/{there.name}/{SCORES}/{folder}") == {
        path.relative_to(there.scores_directory).as_posix(): path.read_bytes()
        for path in there.scores_directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_same_files_again_and_export_reused(spark: SparkSession, run: Run) -> None:
    config = run.config()
    first = scoring.run(spark, config)
    matrix = run.directory / "export" / "step-00000012" / "item_matrix.npy"
    assert np.load(matrix).shape == (NUM_ITEMS, 35)
    written = matrix.stat().st_mtime_ns
    # other blocks and another number of partitions change nothing but the files
    second = scoring.run(spark, run.config(user_block=7, item_block=1000, num_files=1))
    assert len(second.files) == 1
    assert matrix.stat().st_mtime_ns == written
    assert first.num_rows == second.num_rows
    # a damaged export is made again
    matrix.write_bytes(matrix.read_bytes()[:-4])
    assert scoring.run(spark, config).files == first.files
    assert np.load(matrix).shape == (NUM_ITEMS, 35)


def test_block_list_short_lists_and_seen_items(
    spark: SparkSession, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "blocked.csv"
    blocked = list(range(2, 38))
    path.write_text("item_id\n" + "".join(f"i{k}\n" for k in [*blocked, blocked[0]]) + "i999\n")
    config = run.config(block_list=str(path), k=9, exclude_seen=False)
    with caplog.at_level(logging.INFO, logger="distrec.score"):
        manifest = scoring.run(spark, config)
    assert "block list: 36 items; 1 ids are in no catalogue" in caplog.text
    ids, _, shares = known_users(run)
    rows = read_scores(config)
    # 44 items less 36
    assert manifest.num_rows == NUM_USERS * 8
    for user, share in zip(ids, shares, strict=True):
        check_user(rows[user], share, blocked, k=9)


def new_user(history: list[int], group: int = 0, age: float = 0.0, seen: int = 0) -> Batch:
    """As the reader would make it of a user whom train has never seen."""
    one = torch.ones(1, dtype=torch.int64)
    bag = Jagged.from_lists([history])
    return Batch(
        user_index=one * c.UNKNOWN_INDEX, item_index=one * 0, time=one * 0,
        labels=torch.zeros(1, 1), weights=torch.zeros(1), num_events=one * (seen or len(history)),
        history=bag, history_times=Jagged(torch.zeros_like(bag.values), bag.offsets),
        history_types=Jagged(torch.full_like(bag.values, c.UNKNOWN_INDEX), bag.offsets),
        ids={"user_group": Jagged.singles(one * group), "context_hour": Jagged.singles(one * 0)},
        dense=torch.tensor([[age]]),
    )  # fmt: skip


def test_listed_users_known_and_new(spark: SparkSession, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    long = list(range(2, 14))
    rows = [
        ("u5", None, None, None),
        ("by history", ["i4", "i41", "no item", "i9", "i4"], None, None),
        ("by features", [], 3, 0.5),
        ("nothing", None, None, None),
        # longer than L = 8, and the first item once more: only its later place counts
        ("long", [f"i{k}" for k in [*long, 2]], None, None),
        ("u5", ["i2"], None, None),
    ]
    schema = pa.schema(
        [(c.USER_ID, pa.string()), (c.HISTORY, pa.list_(pa.string())),
         ("user_group", pa.int64()), ("user_age", pa.float32())]
    )  # fmt: skip
    names = schema.names
    pq.write_table(
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema), path
    )
    config = run.config(users=str(path))
    assert scoring.run(spark, config).num_users == 5
    found = read_scores(config)
    ids, seen, shares = known_users(run)
    place = ids.index("u5")
    expected = {
        "u5": (shares[place], seen[place]),
        "by history": (run.shares(new_user([41, 9, 4]))[0], [41, 9, 4]),
        "by features": (run.shares(new_user([], 3, 0.5))[0], []),
        "nothing": (run.shares(new_user([]))[0], []),
        "long": (run.shares(new_user([*long[-7:], 2], seen=12))[0], long),
    }
    assert sorted(found) == sorted(expected)
    for user, (share, masked) in expected.items():
        check_user(found[user], share, masked)


def with_raw_features(run: Run, directory: Path) -> Run:
    """The same run, whose dataset knows how its user features were read."""
    shutil.copytree(run.directory, directory)
    copied = Run.__new__(Run)
    copied.__dict__ |= run.__dict__
    copied.directory, copied.dataset = directory, directory / "dataset"
    names = pa.table(
        {
            c.VALUE: ["student", "doctor", "writer", "farmer"],
            c.ID: pa.array(range(2, 6), pa.int64()),
            c.COUNT: pa.array([4, 3, 2, 1], pa.int64()),
        }
    )
    folder = copied.dataset / "vocab" / "user_group"
    folder.mkdir(parents=True)
    path = folder / "part-00000.parquet"
    pq.write_table(names, path)
    document = json.loads((copied.dataset / "manifest.json").read_text())
    document["vocabularies"]["user_group"] = {
        "name": "user_group", "num_embeddings": 6, "sha256": "0" * 64,
        "files": [{"path": "vocab/user_group/part-00000.parquet", "num_rows": 4,
                   "num_bytes": path.stat().st_size, "sha256": sha256(path)}],
    }  # fmt: skip
    document["statistics"] = {
        "user_age": {"mean": 30.0, "std": 10.0, "min": 1.0, "max": 90.0, "missing": 0.0}
    }
    prepare = copied.config().prepare.model_dump(mode="json", exclude_none=True)
    prepare["users"] = {
        "paths": ["users.csv"], "id": "user_id",
        "features": [{"column": "job", "kind": "categorical", "name": "group"},
                     {"column": "age", "kind": "number"}],
    }  # fmt: skip
    document["config"] = {"prepare": prepare}
    (copied.dataset / "manifest.json").write_text(json.dumps(document))
    copied.manifest = DatasetManifest.model_validate(document)
    # the checkpoint was of a dataset without this vocabulary
    path = directory / "checkpoints" / "step-00000012" / "manifest.json"
    stored = json.loads(path.read_text())
    stored["vocabularies"]["user_group"] = "0" * 64
    path.write_text(json.dumps(stored))
    return copied


def test_raw_features_and_histories_as_text(spark: SparkSession, run: Run, tmp_path: Path) -> None:
    raw = with_raw_features(run, tmp_path / "raw")
    path = tmp_path / "users.csv"
    path.write_text(
        "user_id,history,job,age\nann,i4|i9,writer,45\nbob,,astronaut,\ncid,,,30\nu7,,doctor,9\n"
    )
    config = raw.config(users=str(path))
    scoring.run(spark, config)
    found = read_scores(config)
    ids, seen, shares = known_users(raw)
    place = ids.index("u7")
    expected = {
        "ann": (raw.shares(new_user([4, 9], 4, 1.5))[0], [4, 9]),
        "bob": (raw.shares(new_user([], c.UNKNOWN_INDEX, 0.0))[0], []),
        "cid": (raw.shares(new_user([], c.PADDING_INDEX, 0.0))[0], []),
        "u7": (shares[place], seen[place]),
    }
    assert sorted(found) == sorted(expected)
    for user, (share, masked) in expected.items():
        check_user(found[user], share, masked)


def write_csv(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_lists_that_cannot_be_used(spark: SparkSession, run: Run, tmp_path: Path) -> None:
    def refused(message: str, **score: object) -> None:
        with pytest.raises(DataError, match=message):
            scoring.run(spark, run.config(**score))

    refused(r"every path of score\.users must match a file.*gone\.csv", users="/gone.csv")
    no_column = write_csv(tmp_path / "a.csv", "user,age\nann,3\n")
    refused(r"score\.users must have a column 'user_id'.*\['user', 'age'\]", users=no_column)
    empty = write_csv(tmp_path / "b.csv", "user_id\n")
    refused(r"score\.users must name at least one user", users=empty)
    nameless = write_csv(tmp_path / "c.csv", "user_id,history\nann,\n,i4\n")
    refused(r"1 rows of .*c\.csv where column 'user_id' is empty.*i4", users=nameless)
    text_ids = write_csv(tmp_path / "d.csv", "user_id,user_group\nann,3\n")
    refused(r"'user_group' of score\.users holds the encoded feature, of type bigint. Received: "
            "string", users=text_ids)  # fmt: skip
    beyond = tmp_path / "e.parquet"
    pq.write_table(pa.table({"user_id": ["ann"], "user_group": pa.array([6], pa.int64())}), beyond)
    refused("column 'user_group' is outside its range", users=str(beyond))
    everything = write_csv(tmp_path / "f.csv", "item_id\n" + "".join(f"i{k}\n" for k in range(50)))
    refused(r"leaves something to recommend.*all 44 items", block_list=everything)


def test_checkpoint_of_another_dataset(spark: SparkSession, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.directory / "checkpoints", other / "checkpoints")
    write_dataset(other / "dataset", num_users=NUM_USERS + 1)
    config = run.config().model_copy(update={"output": str(other)})
    with pytest.raises(CheckpointError, match=r"differ in .* 'user_id', num_users, event_types"):
        scoring.run(spark, config)
    assert not config.scores_directory.exists()


def test_a_full_disk_leaves_the_old_scores(spark: SparkSession, run: Run, disk: Disk) -> None:
    full = disk(16 * 1024)
    shutil.copytree(run.directory, full / "run", ignore=lambda *_: ("export", "scores"))
    config = run.config().model_copy(update={"output": str(full / "run")})
    scoring.run(spark, config)
    before = snapshot(full / "run")
    fill(full, 4)
    with pytest.raises(DataError, match=r"(?i)no space left on device"):
        scoring.run(spark, config)
    assert snapshot(full / "run") == before
    # not even the encoded catalogue
    shutil.rmtree(full / "run" / "export")
    before = snapshot(full / "run")
    fill(full, 4)
    with pytest.raises(DataError, match=r"(?i)no space left on device"):
        scoring.run(spark, config)
    after = snapshot(full / "run")
    after.pop("export", None)
    assert after == before


def test_failure_on_an_executor_leaves_the_old_scores(
    spark: SparkSession, run: Run, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run.directory, directory)
    config = run.config().model_copy(update={"output": str(directory)})
    scoring.run(spark, config)
    before = read_scores(config)
    matrix = directory / "export" / "step-00000012" / "item_matrix.npy"
    values = np.load(matrix)
    values[3, 0] = np.nan
    np.save(matrix, values)
    with pytest.raises(DataError, match=r"^a score is a number\. Received: NaN"):
        scoring.run(spark, config)
    assert read_scores(config) == before
    assert not list(directory.glob(".scores-*"))
