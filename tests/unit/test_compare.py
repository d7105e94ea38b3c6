"""Runs side by side: known intervals, the same users in another order, the page, the command."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from typer.testing import CliRunner

from distrec.cli import app
from distrec.compare import bootstrap_means, compare, interval
from distrec.errors import ConfigError, DataError
from distrec.metrics.query_ranks import SCHEMA
from distrec.report.comparison import render_comparison

NUM_USERS = 400


def rows_of(split: str, model: str, ranks: np.ndarray, order: np.ndarray) -> list[dict[str, Any]]:
    """One target a user, found at ranks[user], or not where that is 0; odd users are cold."""
    return [
        {
            "split": split,
            "model": model,
            "query": place,
            "user_index": int(user) + 2,
            "is_cold_user": bool(user % 2),
            "num_targets": 1,
            "num_cold_targets": int(user % 4 == 0),
            "ranks": [int(ranks[user])] if ranks[user] else [],
            "cold_ranks": [int(ranks[user])] if ranks[user] and user % 4 == 0 else [],
            "num_new_targets": int(user % 8 == 0),
            "new_ranks": [int(ranks[user])] if ranks[user] and user % 8 == 0 else [],
        }
        for place, user in enumerate(order)
    ]


def write_run(
    directory: Path,
    models: Mapping[str, np.ndarray],
    queries_hash: str = "same",
    seed: int | None = None,
    ks: tuple[int, ...] = (5, 10),
) -> Path:
    """What evaluate leaves, for test; with a seed, its queries are in another order."""
    directory.mkdir()
    order = np.arange(NUM_USERS)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    rows = [row for name, ranks in models.items() for row in rows_of("test", name, ranks, order)]
    path = directory / "query_ranks.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    document = {
        "ks": list(ks),
        "query_ranks": {
            "path": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "splits": {"test": {"queries_hash": queries_hash, "models": {name: {} for name in models}}},
    }
    (directory / "metrics.json").write_text(json.dumps(document))
    return directory


def draw_ranks(seed: int, share: float = 0.5) -> np.ndarray:
    """Ranks 1 to 20 of a share of the users."""
    generator = np.random.default_rng(seed)
    found = generator.random(NUM_USERS) < share
    return np.where(found, generator.integers(1, 21, NUM_USERS), 0)


def test_draws_spread_as_the_standard_error_says() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 2))
    values[:, 1] = np.where(np.arange(500) % 2, values[:, 1], np.nan)
    draws = bootstrap_means(values, 2000, np.random.default_rng(1))
    for column, size in ((0, 500), (1, 250)):
        known = values[~np.isnan(values[:, column]), column]
        assert len(known) == size
        assert draws[:, column].mean() == pytest.approx(known.mean(), abs=0.01)
        assert draws[:, column].std() == pytest.approx(known.std() / size**0.5, rel=0.06)


def test_the_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=200)
    draws = bootstrap_means(values[:, None], 4000, np.random.default_rng(1))
    found = interval(values.mean(), draws[:, 0])
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=2
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.015)
    assert found.high == pytest.approx(expected.high, abs=0.015)


def test_the_same_users_are_paired_in_whatever_order(tmp_path: Path) -> None:
    ranks = draw_ranks(0)
    better = np.where(np.arange(NUM_USERS) % 40 == 0, 1, ranks)
    first = write_run(tmp_path / "first", {"distrec": ranks})
    again = write_run(tmp_path / "again", {"distrec": ranks}, seed=1)
    ahead = write_run(tmp_path / "ahead", {"distrec": better}, seed=2)
    other = write_run(tmp_path / "other", {"distrec": better}, "others", seed=2)
    rows = compare([first, again, ahead, other], ["hr@10"]).parts["test", "all"]
    hits = (ranks > 0) & (ranks <= 10)
    assert rows[0].values["hr@10"].mean == pytest.approx(hits.mean())
    assert rows[0].differences == {}
    same = rows[1].differences["hr@10"]
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    gain = ((better > 0) & (better <= 10)).mean() - hits.mean()
    paired, unpaired = rows[2].differences["hr@10"], rows[3].differences["hr@10"]
    assert paired.mean == unpaired.mean == pytest.approx(gain)
    assert [row.is_paired for row in rows] == [True, True, True, False]
    # a user in forty differs: among the same users that is seen, among others it is not
    assert paired.low > 0 > unpaired.low
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)


def test_slices_and_metrics_by_hand(tmp_path: Path) -> None:
    ranks = draw_ranks(3)
    run = write_run(tmp_path / "run", {"distrec": ranks})
    comparison = compare([run], ["ndcg@7", "mrr@3"])
    users = np.arange(NUM_USERS)
    groups = {
        "all": users >= 0,
        "cold_users": users % 2 == 1,
        "warm_users": users % 2 == 0,
        "cold_items": users % 4 == 0,
        "warm_items": users % 4 != 0,
        "new_items": users % 8 == 0,
    }
    for group, members in groups.items():
        (row,) = comparison.parts["test", group]
        chosen = ranks[members]
        gains = [1 / np.log2(1 + rank) if 0 < rank <= 7 else 0 for rank in chosen]
        assert row.num_queries == members.sum()
        assert row.values["ndcg@7"].mean == pytest.approx(np.mean(gains))
        inverse = [1 / rank if 0 < rank <= 3 else 0 for rank in chosen]
        assert row.values["mrr@3"].mean == pytest.approx(np.mean(inverse))


def test_a_baseline_that_is_the_same_is_shown_once(tmp_path: Path) -> None:
    popular = draw_ranks(5)
    runs = [
        write_run(
            tmp_path / name, {"distrec": draw_ranks(seed), "popularity": popular, "ease": own}
        )
        for name, seed, own in (("a", 6, draw_ranks(8)), ("b", 7, draw_ranks(9)))
    ]
    rows = compare(runs).parts["test", "all"]
    assert [row.label for row in rows] == ["a", "popularity", "ease (a)", "b", "ease (b)"]
    assert list(rows[0].values) == ["ndcg@10", "hr@10", "recall@10", "mrr@10"]
    (_, popularity, _) = compare(runs[:1]).parts["test", "all"]
    assert popularity.label == "popularity"


def test_a_run_of_before_there_were_new_items(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"distrec": draw_ranks(0)})
    path = run / "query_ranks.parquet"
    pq.write_table(pq.read_table(path).drop(["num_new_targets", "new_ranks"]), path)
    document = json.loads((run / "metrics.json").read_text())
    document["query_ranks"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "metrics.json").write_text(json.dumps(document))
    parts = compare([run], resamples=20).parts
    assert parts["test", "cold_items"][0].num_queries == NUM_USERS / 4
    assert parts["test", "new_items"][0].num_queries == 0


def test_only_what_all_runs_have(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(k), {"distrec": draw_ranks(k)}, ks=(3, k)) for k in (5, 20)]
    assert compare(runs).metrics == ("ndcg@5", "hr@5", "recall@5", "mrr@5")
    for wanted in ("ndcg@10", "auc"):
        with pytest.raises(ConfigError, match=rf"up to K = 5, .*Received: {wanted}\."):
            compare(runs, [wanted])


def test_what_is_not_of_one_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Received: .*nothing: FileNotFoundError"):
        compare([tmp_path / "nothing"])
    run = write_run(tmp_path / "run", {"distrec": draw_ranks(0)})
    path = run / "query_ranks.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match=r"written by one evaluate. Received: .* expected"):
        compare([run])
    (run / "metrics.json").write_text('{"ks": [5]}')
    with pytest.raises(DataError, match=r"Received: .*run: KeyError: 'query_ranks'. Run distrec"):
        compare([run])


def test_the_page_shows_every_run_and_lets_no_markup_through(tmp_path: Path) -> None:
    evil = "<b>x&y"
    first = write_run(tmp_path / "first", {"distrec": draw_ranks(0), "ease": draw_ranks(1, 0.9)})
    second = write_run(tmp_path / evil, {"distrec": draw_ranks(2)}, "others")
    page = render_comparison(compare([first, second], resamples=50).as_dict())
    assert evil not in page
    assert "&lt;b&gt;x&amp;y" in page
    # four metrics, and a chart for each of five slices
    assert page.count('<svg class="chart"') == 9
    assert "Not measured on the users of first" in page
    ease = page[page.index('<th scope="row">ease (first)</th>') :]
    assert re.search(r'<strong title="the interval leaves out zero">\+0\.\d{4} \(\+0', ease)
    assert "nan" not in page


def test_the_command_prints_tables_writes_the_page_or_prints_json(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {"distrec": draw_ranks(0), "ease": draw_ranks(1, 0.9)})
    second = write_run(tmp_path / "second", {"distrec": draw_ranks(2)})
    page = tmp_path / "pages" / "page.html"
    runs = [str(first), str(second), "--resamples", "50", "--metric", "hr@10"]
    shown = CliRunner().invoke(
        app, ["compare", *runs, "--output", str(page)], env={"COLUMNS": "120"}
    )
    assert shown.exit_code == 0, shown.output
    assert "test: 400 users" in shown.stdout
    assert "test, cold items: 100 users" in shown.stdout
    assert re.search(r"ease \(first\) +│ +0\.\d{4} \+ │\n│ +│ 0\.\d{4}–0\.\d{4} │", shown.stdout)
    assert page.read_text().startswith("<!doctype html>")
    printed = CliRunner().invoke(app, ["compare", *runs, "--json"])
    document = json.loads(printed.stdout)
    assert document["reference"] == "first"
    row = document["parts"][0]["rows"][1]
    assert (row["model"], row["num_queries"], row["is_paired"]) == ("ease", NUM_USERS, True)
    assert row["differences"]["hr@10"]["low"] > 0
