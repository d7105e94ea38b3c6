"""The report: right numbers in the right rows, missing parts told, nothing of a title executed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec import job
from distrec.config import Config, parse_config
from distrec.config.secrets import mask_text
from distrec.errors import DataError
from distrec.report import files, write_report
from distrec.report.choice import choose_users, hash_ids, open_scores
from distrec.report.data import length_bins, open_split, popularity_points, share_of_top
from distrec.report.files import read_run
from distrec.report.metrics import verdict
from distrec.report.sample import plain_bucket, read_sample
from distrec.report.scales import linear_ticks, log_ticks
from tests.synthetic import write_dataset

EVIL = '</script><script>alert("it\'s")</script> & <b>film</b>'
NUM_USERS = 30
SCORE_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.string()),
        ("score", pa.float32()),
        ("reasons", pa.map_(pa.string(), pa.float32())),
        ("model_version", pa.string()),
    ]
)


class Page(HTMLParser):
    """What a browser would make of the text: rows of cells, elements, text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._section = self._caption = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values))
        self._inside.append(tag)
        if tag == "section":
            self._section = values["id"] or ""
        if tag == "table":
            self._caption = ""
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.rows[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._inside
        if inside and inside[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in inside:
            self.text += data
        if "caption" in inside:
            self._caption += data
        elif ("td" in inside or "th" in inside) and "tr" in inside:
            self.rows[self._caption][-1][-1] += data.strip()

    def row(self, caption: str, first: str) -> list[str]:
        """The cells of the one row that begins with `first`, in the table of that caption."""
        found = [row for row in self.rows[caption] if row and row[0] == first]
        assert len(found) == 1, (caption, first, self.rows.get(caption))
        return found[0]


def run_config(directory: Path, **changes: Any) -> Config:
    """The configuration of a small run in `directory`."""
    document: dict[str, Any] = {
        "name": "small",
        "output": str(directory),
        "prepare": {"events": {"paths": ["events.csv"], "time": "time"}},
        "report": {"sample_users": 12},
        "spark": {"conf": {"spark.hadoop.fs.s3a.secret.key": "hunter2"}},
        "launch": {"num_ranks": 2},
    }
    return parse_config(document | changes, "test")


def _model(scale: float) -> dict[str, Any]:
    values = {
        f"{name}@{k}": scale * (0.1 + k / 1000)
        for name in ("hr", "recall", "precision", "ndcg", "mrr", "map", "coverage", "diversity")
        for k in (5, 10)
    }
    values |= {"popularity@5": 40 / scale, "popularity@10": 30 / scale, "surprise@10": scale}
    slices = {
        "cold_users": {"num_queries": 7, "metrics": {"ndcg@10": scale * 0.05}},
        "warm_users": {"num_queries": 23, "metrics": {"ndcg@10": scale * 0.15}},
        "among_new_items": {"num_queries": 2, "metrics": {"ndcg@10": scale * 0.45}},
    }
    classification = {"auc": 0.4 * scale, "log_loss": 1 - 0.3 * scale, "num_examples": 12345}
    return {"metrics": values, "slices": slices, "classification": classification}


def metrics_document() -> dict[str, Any]:
    """A metrics.json in which distrec's NDCG@10 on test is 0.22, item kNN's 0.165."""
    models = {"popularity": _model(1.0), "item_knn": _model(1.5), "distrec": _model(2.0)}
    models["distrec"]["classification"] |= {"auc:bought": 0.777, "log_loss:bought": 0.333}
    return {
        "created_at": "2026-03-01T10:00:00+00:00",
        "checkpoint": "step-00000040",
        "model_version": "step-00000040-abc",
        "dataset_hash": "0",
        "ks": [5, 10],
        "splits": {
            "valid": {"num_queries": NUM_USERS, "models": models},
            "test": {"num_queries": NUM_USERS, "models": models},
        },
    }


def complete_run(directory: Path) -> Config:
    """A run directory with every part that the report reads, an evil title among the items."""
    config = run_config(directory)
    write_dataset(config.dataset_directory, num_users=NUM_USERS)
    path = config.dataset_directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"] = {"read": 1000, "rejected": 30, "kept": 970}
    manifest["rejects"] = {"time in the future": 10, EVIL: 20}
    path.write_text(json.dumps(manifest))
    items = config.dataset_directory / "items/part-00000.parquet"
    table = pq.read_table(items)
    titles = [EVIL, *table["title"].to_pylist()[1:]]
    pq.write_table(
        table.set_column(table.schema.get_field_index("title"), "title", [titles]), items
    )
    config.metrics_path.write_text(json.dumps(metrics_document()))
    _write_logs(config.logs_directory)
    _write_scores(config.scores_directory, [f"u{number}" for number in range(NUM_USERS)])
    return config


def _write_logs(logs: Path) -> None:
    logs.mkdir()
    curve = [
        {"kind": "step", "step": step, "epoch": 1, "loss": loss, "learning_rate": 0.001,
         "examples_per_second": 5000.0, "seconds": 1.0}
        for step, loss in ((10, 5.0), (20, 4.0), (30, 99.0), (20, 3.5), (30, 3.25), (40, 3.0))
    ]  # fmt: skip
    curve += [
        {"kind": "valid", "step": step, "metrics": {"ndcg@10": ndcg},
         "weights": {"cf": 0.5, "deep": deep, "bias": 1.0, "new_item_bias": -2.0}}
        for step, ndcg, deep in ((20, 0.18, 1.25), (40, 0.19, 1.5))
    ]  # fmt: skip
    lines = "".join(json.dumps(entry) + "\n" for entry in curve)
    # a crash cuts the last line off
    (logs / "train.jsonl").write_text(lines + '{"kind": "step", "st')
    plan = [
        {"name": "item_id", "num_embeddings": 42, "embedding_dim": 64, "placement": "row_wise",
         "weight_bytes_by_rank": [5376, 5376], "state_bytes_by_rank": [84, 84]},
        {"name": "group", "num_embeddings": 6, "embedding_dim": 16, "placement": "replicated",
         "weight_bytes_by_rank": [384, 384], "state_bytes_by_rank": [24, 24]},
    ]  # fmt: skip
    (logs / "plan.json").write_text(json.dumps(plan))
    jobs = [
        {"job": "prepare", "seconds": 99.0, "exit_code": 3, "message": "no file"},
        {"job": "prepare", "seconds": 30.0, "started_at": "2026-03-01T09:00:00+00:00",
         "exit_code": 0, "summary": {"rows": 970}},
        {"job": "train", "seconds": 75.0, "started_at": "2026-03-01T09:01:00+00:00",
         "exit_code": 0, "summary": {"store_password": "hunter2"}},
        {"job": "report", "seconds": 1.0, "exit_code": 0, "summary": {}},
    ]  # fmt: skip
    (logs / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))


def _write_scores(directory: Path, users: list[str], k: int = 5) -> None:
    (directory / "top_k").mkdir(parents=True)
    rows = [
        {
            "user_id": user,
            "rank": rank,
            "item_id": f"i{1 + rank}",
            "score": 6.0 - rank,
            "reasons": [("cf", 0.5), ("deep", 0.75), ("autoencoder", -0.25), ("bias", 5.0 - rank)],
            "model_version": "step-00000040-abc",
        }
        for user in users
        for rank in range(1, k + 1)
    ]
    table = pa.Table.from_pylist(rows, SCORE_SCHEMA)
    pq.write_table(table, directory / "top_k/part-00000.parquet")
    # what the manifest does not name is no part of it
    pq.write_table(table.slice(0, 1), directory / "top_k/part-00001.parquet")
    manifest = {"num_users": len(users), "files": [{"path": "top_k/part-00000.parquet"}]}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str, Page]:
    config = complete_run(tmp_path_factory.mktemp("run"))
    path = write_report(config)
    assert path == config.report_path
    text = path.read_text(encoding="utf-8")
    return config, text, Page(text)


def test_numbers_stand_in_their_rows(complete: tuple[Config, str, Page]) -> None:
    _, _, page = complete
    ranking = "Ranking metrics on test at K = 10"
    heads = page.rows[ranking][0]
    assert heads[:3] == ["Model", "NDCG@10", "Recall@10"]
    # 2.0 * (0.1 + 10 / 1000), and 1.5 times as much for the neighbours
    assert page.row(ranking, "distrec")[1] == "0.2200(best)"
    assert page.row(ranking, "item kNN")[1] == "0.1650"
    assert page.row("Ranking metrics on valid at K = 5", "popularity")[1] == "0.1050"
    beyond = "Beyond accuracy on test at K = 10"
    place = page.rows[beyond][0].index("Popularity@10")
    # neither much nor little popularity is best
    assert page.row(beyond, "distrec")[place] == "15.0"
    of_task = "Metrics of examples on test, bought"
    assert page.rows[of_task][0] == ["Model", "AUC", "Log losslower is better"]
    assert page.row(of_task, "distrec")[1:3] == ["0.7770", "0.3330"]
    assert page.row("Metrics of examples on test", "distrec")[1] == "0.8000(best)"
    slices = [
        row for row in page.rows["Metrics by slice on test at K = 10"] if "0.3000(best)" in row
    ]
    assert [row[0] for row in slices] == ["warm users23 queries"]
    # in each table, and in no chart, whose scale it would set
    tables = [rows for caption, rows in page.rows.items() if caption.startswith("Metrics by slice")]
    assert page.text.count("new items, of these alone") == len(tables) == 4
    assert page.text.count("cold users") > 4
    assert page.row("Rows after each stage of prepare", "rejected")[1] == "30"
    assert page.row("Rejected rows by reason", EVIL)[1] == "20"
    assert page.row("Splits of the dataset", "train")[1:3] == ["360", "3"]
    assert page.row("Embedding tables", "item_id")[2:5] == ["42", "64", "10.5 KiB"]
    # 5,376 bytes of weights and 84 of state
    assert page.row("Embedding tables", "item_id")[6] == "5.3 KiB"
    jobs = "The latest run of each job"
    assert page.row(jobs, "prepare")[1:4] == ["30 s", "2026-03-01 09:00:00 UTC", "done"]
    assert [row[0] for row in page.rows[jobs]] == ["Job", "prepare", "train"]
    assert "ahead of the best baseline, item kNN (0.1650): 1.33 times its value." in page.text


def test_curve_after_a_restart_shows_the_later_steps(complete: tuple[Config, str, Page]) -> None:
    config, text, _ = complete
    assert files.JOBS_LOG == job.JOBS_LOG
    losses = [(entry["step"], entry["loss"]) for entry in read_run(config).steps]
    assert losses == [(10, 5.0), (20, 3.5), (30, 3.25), (40, 3.0)]
    assert "Training loss by step, from 5 at step 10 to 3 at step 40." in text
    assert "best 0.1900 at step 40" in text
    # the log counts epochs from 0
    assert "40 steps, the last in epoch 2, on 2 ranks" in text


def test_curves_of_the_weights_that_valid_gives(complete: tuple[Config, str, Page]) -> None:
    _, text, page = complete
    expected = "Weight of each tower by step, at the end cf 0.5000, deep 1.5000, bias 1.0000."
    assert expected in text
    assert "deep: step 20, weight 1.2500" in text
    assert "Weights of the towers" in page.text


def test_words_of_features_are_plain() -> None:
    assert [plain_bucket(word) for word in ("(-inf, 21]", "(21, 25]", "(50, inf]", "student")] == [
        "≤ 21",
        "(21, 25]",
        "> 50",
        "student",
    ]


def test_titles_are_text_and_secrets_are_hidden(complete: tuple[Config, str, Page]) -> None:
    _, text, page = complete
    tags = [tag for tag, _ in page.elements]
    # the sample's data and the page's own script, no third one
    assert tags.count("script") == len(page.scripts) == 2
    assert "b" not in tags
    sample = json.loads(page.scripts[0])
    assert sample["items"][0][0] == EVIL
    assert "hunter2" not in text
    assert text.count("(hidden)") >= 2


def test_nothing_is_fetched(complete: tuple[Config, str, Page]) -> None:
    _, text, page = complete
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
        assert tag not in ("iframe", "object", "embed", "base", "img")
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest", text)
    assert len(text) < 1_000_000


def test_sample_is_of_the_right_users_items_and_shares(complete: tuple[Config, str, Page]) -> None:
    config, _, page = complete
    sample = json.loads(page.scripts[0])
    assert len(sample["users"]) == 12
    assert sample["towers"] == ["cf", "autoencoder", "deep", "bias"]
    users = pq.read_table(config.dataset_directory / "users/part-00000.parquet").to_pylist()
    histories = {row["user_id"]: row["history"] for row in users}
    for user in sample["users"]:
        shown = [sample["items"][item][0] for item, _ in user["history"]]
        expected = [EVIL if index == 2 else f"Item {index}" for index in histories[user["id"]]]
        assert shown == expected[::-1]
        item, score, shares = user["recommendations"][1]
        assert (sample["items"][item][0], score, shares) == ("Item 3", 4.0, [0.5, -0.25, 0.75, 3.0])


def test_written_twice_it_is_the_same_and_leaves_nothing_else(
    complete: tuple[Config, str, Page],
) -> None:
    config, text, _ = complete
    before = sorted(path.name for path in config.directory.iterdir())
    assert write_report(config).read_text(encoding="utf-8") == text
    assert sorted(path.name for path in config.directory.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("metrics.json", "distrec evaluate"),
        ("dataset", "distrec prepare"),
        ("scores", "distrec score"),
        ("logs", "distrec train"),
        ("", "distrec run"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "other"])
def test_a_part_that_is_missing_or_damaged_is_told(
    tmp_path: Path, part: str, said: str, damage: str
) -> None:
    config = complete_run(tmp_path / "run")
    root = config.directory / part
    for path in [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]:
        if damage == "missing":
            path.unlink()
        else:
            path.write_text("" if damage == "empty" else '[{"a": [1, null]}]')
    page = Page(write_report(config).read_text(encoding="utf-8"))
    assert said in page.text
    ids = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert {"metrics", "slices", "sample", "curves", "data", "tables", "timings"} <= ids


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path)
    config.report_path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distrec.files.os.fsync", full)
    with pytest.raises(DataError, match=r"No space left on device\. Free space"):
        write_report(config)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert config.report_path.read_text() == "old"


def test_choice_depends_on_the_seed_takes_cold_users_and_goes_by_scores(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset", num_users=60)
    path = tmp_path / "dataset/users/part-00000.parquet"
    table = pq.read_table(path)
    # users 0 to 9 are cold
    events = pa.array([3] * 10 + [14] * 50, pa.int64())
    table = table.set_column(table.schema.get_field_index("num_events"), "num_events", events)
    pq.write_table(table, path)
    users = open_split(tmp_path / "dataset", manifest, "users")
    first = choose_users(users, None, 20, cold=10, seed=1)
    assert len(set(first)) == 20
    assert sum(int(user[1:]) < 10 for user in first) == 4
    assert choose_users(users, None, 20, cold=10, seed=1) == first
    assert choose_users(users, None, 20, cold=10, seed=2) != first
    # whatever the order of the rows
    pq.write_table(table.take(list(range(59, -1, -1))), path)
    users = open_split(tmp_path / "dataset", manifest, "users")
    assert choose_users(users, None, 20, cold=10, seed=1) == first
    _write_scores(tmp_path / "scores", ["u3", "u40", "somebody new"])
    scores = open_scores(tmp_path / "scores", {"files": [{"path": "top_k/part-00000.parquet"}]})
    assert set(choose_users(users, scores, 20, cold=10, seed=1)) == {"u3", "u40", "somebody new"}
    # fixed for all time: another value would show other users after an upgrade
    assert hash_ids(["u1"], 1).tolist() == [10419473953673862326]


def test_scores_without_a_dataset_show_ids(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    _write_scores(config.scores_directory, ["a"])
    sample = read_sample(config, read_run(config))
    assert sample is not None
    assert [(user["id"], user["kind"]) for user in sample["users"]] == [("a", "new")]
    item, _, _ = sample["users"][0]["recommendations"][0]
    assert sample["items"][item] == ["i2", "", None]


def test_verdict_says_when_the_model_is_behind() -> None:
    document = metrics_document()
    document["splits"]["test"]["models"]["distrec"] = _model(0.75)
    found = verdict(document, "ndcg@10")
    assert found is not None
    assert "0.0825, behind the best baseline, item kNN (0.1650): 0.50 times" in found["text"]
    assert verdict({"splits": {}}, "ndcg@10") is None


def test_popularity_and_length_by_hand() -> None:
    # one item with 10 events, two with 5, four with 1, three without
    counts = {0: 3, 1: 4, 5: 2, 10: 1}
    assert popularity_points(counts) == [(1, 10), (2, 5), (3, 5), (4, 1), (5, 1), (6, 1), (7, 1)]
    # 24 events; of 10 items a tenth is one
    assert share_of_top(counts, 0.1) == pytest.approx(10 / 24)
    assert share_of_top(counts, 0.3) == pytest.approx(20 / 24)
    labels, amounts = length_bins({1: 3, 2: 1, 4: 2, 5: 1, 10: 5, 11: 6, 70: 1})
    assert labels == ["1", "2", "3-5", "6-10", "11-20", "21-50", "51-100"]
    assert amounts == [3, 1, 3, 5, 6, 0, 1]
    assert length_bins({1: 1, 700: 2})[0][-2:] == ["201-500", "501-1k"]


def test_ticks_cover_the_data_in_round_steps() -> None:
    assert linear_ticks(0.0, 0.0868) == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert linear_ticks(3.0, 3.0)[0] <= 3.0 < linear_ticks(3.0, 3.0)[-1]
    assert log_ticks(1, 1682) == [1, 10, 100, 1000, 10000]
    assert log_ticks(12, 95) == [10, 20, 50, 100]


def test_secrets_inside_longer_settings_are_hidden() -> None:
    assert (
        mask_text("-Xmx1g -Dstore.password=abc -Dx=1") == "-Xmx1g -Dstore.password=(hidden) -Dx=1"
    )
    assert mask_text("s3a://me:abc@bucket/path") == "s3a://(hidden)@bucket/path"
    assert mask_text("data/movielens-100k/events.tsv") == "data/movielens-100k/events.tsv"
