"""The plan of a run: its memory, what fits, what is refused; without Spark, Horovod or tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distrec.cli import app
from distrec.errors import ConfigError, DataError
from distrec.model import ModelSpec, UnifiedModel
from distrec.planner import parse_bandwidth, parse_bytes, plan_run
from distrec.planner.dataset import read_sample
from distrec.planner.lookups import TableLookups, _Collected
from distrec.planner.plan import Sizer
from distrec.planner.units import format_bytes
from distrec.sharding.plan import bytes_per_rank
from distrec.sharding.sizing import RowChances
from distrec.trainer.setup import read_inputs
from tests.training import make_config, write_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64GiB", 64 * 2**30), ("1.5 MB", 1_500_000), ("512B", 512), ("2TiB", 2**41)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--memory-per-rank") == expected


@pytest.mark.parametrize("text", ["64", "GiB", "-1GiB", "64Gib", "0GiB", "1e3GiB", "10Gbit", ""])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_bytes(text, "--memory-per-rank")
    assert str(error.value) == (
        f"--memory-per-rank is a size with its unit, above zero. Received: {text!r}. Write 64GiB, "
        "512MiB or another of B, KB, KiB, MB, MiB, GB, GiB, TB, TiB, PB, PiB."
    )


def test_speeds() -> None:
    assert parse_bandwidth("10Gbit", "--bandwidth") == 1.25e9
    assert parse_bandwidth("100Mbit/s", "--bandwidth") == 12.5e6
    for text in ("10GB", "10", "0Gbit", "fast"):
        with pytest.raises(ConfigError, match="--bandwidth is what one rank can send in bits"):
            parse_bandwidth(text, "--bandwidth")


def test_sizes_are_shown_with_a_unit() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 20 * 2**20, 300 * 2**30)] == [
        "0 B", "1023 B", "1.50 KiB", "20.0 MiB", "300 GiB",
    ]  # fmt: skip


def test_tables_and_memory_are_those_of_training(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    report = plan_run(config, 3)
    inputs = read_inputs(config, 3)
    assert tuple(entry.plan for entry in report.tables) == inputs.plans
    held = [rank.memory.table_weights + rank.memory.table_state for rank in report.ranks]
    assert held == list(bytes_per_rank(inputs.plans, 3))
    model = UnifiedModel(inputs.spec, config.model)
    # weights, gradients and two moments of AdamW, four bytes each
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report.ranks[0].memory.dense == 4 * 4 * parameters
    assert sum(rank.share for rank in report.ranks) == pytest.approx(1)


def test_look_ups_are_those_of_the_model(tmp_path: Path) -> None:
    # 720 examples, all of them in the step of one rank: every look-up is certain
    config = make_config(
        tmp_path, {"train": {"global_batch_size": 1000}, "loss": {"kind": "softmax"}}
    )
    found = Sizer(config).lookups(1)
    inputs = read_inputs(config, 1)
    sample = read_sample(config.dataset_directory, inputs.manifest, 10).batch
    assert sample.batch_size == found.num_examples == 720
    model = UnifiedModel(ModelSpec.from_manifest(inputs.manifest), config.model)
    requests = {**model.user_requests(sample), **model.item_requests(inputs.items)}
    trained = inputs.manifest.num_trained_items
    for table, lookups in found.tables.items():
        asked = [request.ids.values for request in requests.values() if request.table == table]
        ids = torch.unique(torch.cat(asked)).numpy()
        # items that train never saw are no candidates, so nothing asks for the unknown row
        ids = ids[ids >= 2] if table in ("item", "item_bias") else ids[ids >= 1]
        rows = lookups.rows
        listed = [np.arange(f, f + n) for f, n in zip(rows.first_ids, rows.num_ids, strict=True)]
        assert np.concatenate(listed).tolist() == ids.tolist(), table
        assert rows.chances == pytest.approx(1)
    assert found.num_candidates == trained - 2
    assert found.tables["user"].num_ids == 720
    assert found.tables["item_history"].num_ids == len(sample.history.values)


def test_hot_rows_that_are_left_to_the_planner(tmp_path: Path) -> None:
    tables = {"user": "row_wise", "item": "row_wise", "item_history": "row_wise"}

    def sizer(hot_rows: object, item: int = 30) -> Sizer:
        result = Sizer(
            make_config(tmp_path, {"sharding": {"tables": tables, "hot_rows": hot_rows}})
        )
        found = result.lookups(2)
        # the first items, and the first 40 of histories, are in every step, the others in few
        for table, number in (("item", item), ("item_history", 40)):
            rows = RowChances(np.array([1, number]), np.array([number - 1, 2]), np.array([1, 0.1]))
            found.tables[table] = TableLookups(0.0, rows)  # type: ignore[index]
        return result

    best = {"item": 30, "item_history": 40}
    assert {k: v for k, v in sizer("auto").hot_rows(2).items() if k in best} == best
    chosen = sizer({"item": "auto", "item_history": 3})
    assert chosen.hot_rows(2) == {"item": 30}
    held = {plan.name: plan.hot_rows for plan in chosen.plans(2)}
    assert (held["item"], held["item_history"], held["user"]) == (30, 3, 0)
    # its count in the header takes more than it saves
    assert sizer({"item": "auto"}, item=20).hot_rows(2) == {}
    assert sizer("auto").hot_rows(1) == sizer({}).hot_rows(2) == {}


def test_the_unknown_row_is_looked_up_in_every_step_where_ids_are_withheld(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"model": {"id_dropout": 0.1}, "loss": {"kind": "softmax"}})
    for table in ("user", "item"):
        rows = Sizer(config).lookups(4).tables[table].rows
        assert (rows.first_ids[0], rows.chances[0]) == (1, 1.0)


def test_items_that_train_never_saw_are_not_drawn(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"loss": {"kind": "sampled_softmax", "num_negatives": 500}})
    rows = Sizer(config).lookups(2).tables["item"].rows
    # they would look up row 1
    assert rows.first_ids[0] == 2


def test_chances_of_a_row_in_two_pieces_add_up() -> None:
    collected = _Collected()
    for ids in ([2, 3], [3, 5]):
        collected.add(np.array(ids), np.log([0.5, 0.5]))
    rows = collected.chances()
    assert rows.first_ids.tolist() == [2, 3, 5]
    assert rows.chances == pytest.approx([0.5, 0.75, 0.5])


def test_windows_have_a_target_an_event_and_pairs_to_look_at(tmp_path: Path) -> None:
    sections = {"model": {"towers": ["cf", "sequence"]}, "train": {"global_batch_size": 1000}}
    sizer = Sizer(make_config(tmp_path, sections, train_rows="windows"))
    found = sizer.lookups(1)
    # of 12 events the last 8 and the first 4, with histories of 8 and 3 and a start each
    assert found.num_examples == 60 * 2
    assert found.num_targets == 60 * 12
    assert found.num_pairs == 60 * (9**2 + 4**2)
    # two layers of two heads, two biases, an index of two numbers
    assert sizer.model.attention_width == 8
    (tmp_path / "others").mkdir()
    others = Sizer(make_config(tmp_path / "others"))
    assert others.lookups(1).num_pairs == 0


def test_towers_with_a_loss_of_their_own_hold_their_vectors(tmp_path: Path) -> None:
    buffers = {}
    for towers in (0.0, 1.0):
        (tmp_path / str(towers)).mkdir()
        loss = {"kind": "softmax", "towers": towers}
        sections = {"loss": loss, "train": {"global_batch_size": 1000}}
        sizer = Sizer(make_config(tmp_path / str(towers), sections))
        buffers[towers] = sizer.memory(0, 1).buffers
    found = sizer.lookups(1)
    encoded = found.num_targets + found.num_candidates
    own = round(encoded * sizer.model.vector_width * 4 * 2)
    assert buffers[1.0] - buffers[0.0] == pytest.approx(own, abs=1)


def test_histories_seen_twice_more_are_looked_up_and_encoded(tmp_path: Path) -> None:
    found, buffers = {}, {}
    for weight in (0.0, 1.0):
        (tmp_path / str(weight)).mkdir()
        sections = {
            # there is nothing yet that may stand in for an item
            "model": {"towers": ["cf", "autoencoder"], "augment": ["crop", "substitute"]},
            "loss": {"kind": "softmax", "contrastive": weight},
            "train": {"global_batch_size": 1000},
        }
        sizer = Sizer(make_config(tmp_path / str(weight), sections, train_rows="windows"))
        found[weight], buffers[weight] = sizer.lookups(1), sizer.memory(0, 1).buffers
    # the longest history of each of 60 users, of 8 events
    assert (found[0.0].num_views, found[1.0].num_views) == (0, 2 * 60)
    more = found[1.0].tables["item_history"].num_ids - found[0.0].tables["item_history"].num_ids
    assert more == 2 * 60 * 8
    layers = 120 * sizer.model.activation_width * 4 * 3
    assert buffers[1.0] - buffers[0.0] == pytest.approx(layers + more * 4 * 8, abs=1)


def test_the_fewest_ranks_are_the_fewest(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"model": {"embedding_dim": 512}})
    sizer = Sizer(config)
    limit = sizer.memory(0, 3).total
    assert sizer.memory(0, 2).total > limit
    assert sizer.fewest_ranks(limit) == 3
    # 62 users: the third of three ranks has a row less
    assert sizer.memory(2, 3).total < limit
    assert sizer.fewest_ranks(limit - 1) == 4
    assert sizer.fewest_ranks(2**20) == 0
    # a lane goes to one rank
    assert Sizer(make_config(tmp_path, {"reader": {"lanes": 2}})).most_ranks == 2


def test_command(tmp_path: Path) -> None:
    path = write_config(make_config(tmp_path))
    arguments = ["plan", str(path), "--ranks", "3", "--memory-per-rank", "1GiB"]
    arguments += ["--bandwidth", "1Gbit", "--set", "sharding.tables.item='replicated'"]
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["fewest_ranks"] == 1
    assert document["bandwidth_bytes_per_second"] == 125e6
    placed = {table["name"]: table["placement"] for table in document["tables"]}
    assert placed["item"] == "replicated"
    assert placed["user"] == "row_wise"
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}).stdout
    for part in ("row_wise", "share of rows", "3 ranks fit 1.00 GiB a rank", "at 1 Gbit/s"):
        assert part in shown


def test_refusals(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match=r"--ranks is at least 1\. Received: 0"):
        plan_run(config, 0)
    with pytest.raises(DataError, match="Run prepare first"):
        plan_run(config.model_copy(update={"output": str(tmp_path / "none")}), 2)


def test_plans_without_spark_horovod_and_kernels() -> None:
    code = (
        "import sys, distrec.planner\n"
        "print([n for n in ('pyspark', 'horovod', 'fbgemm_gpu') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
