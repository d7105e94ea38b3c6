"""The configuration is refused as a whole, with the rule, what was received and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrec.config import dump_config, load_config, section_hash
from distrec.config_reference import reference
from distrec.errors import ConfigError
from distrec.trainer.identity import resume_hash

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "conf").glob("*.toml"))
MOVIELENS = ROOT / "conf" / "movielens-100k.toml"
REPEATS = 'prepare.duplicates="keep_all"'


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    resolved = tmp_path / "config.toml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_overrides_are_toml_values_or_strings() -> None:
    config = load_config(
        MOVIELENS,
        ["train.learning_rate=0.01", 'model.towers=["cf"]', "output=elsewhere/x", "loss.l2=0"],
    )
    assert config.train.learning_rate == 0.01
    assert config.model.towers == ("cf",)
    assert config.directory == Path("elsewhere/x")
    assert config.loss.l2 == 0.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.learning_rat=1",
            f"unknown key 'train.learning_rat' in {MOVIELENS}. Did you mean 'learning_rate'?",
        ),
        ("trian.seed=1", "unknown key 'trian'"),
        (
            "train.learning_rate='fast'",
            f"'train.learning_rate' in {MOVIELENS}: Input should be a valid number. "
            "Received: 'fast'.",
        ),
        ("train.max_epochs='3'", "Input should be a valid integer. Received: '3'."),
        ("loss.kind=binary", 'loss.kind = "binary" needs labels. Received: neither'),
        ("loss.kind=squared", 'loss.kind = "squared" needs ratings. Received: no prepare.predict'),
        (
            "prepare={predict_ratings=true, events={paths=['x'], rating='r', label='y'}}",
            "predict_ratings needs events.rating, and no other label. Received: events.rating = "
            "'r', events.label = 'y'",
        ),
        ("model.embedding_dim=6", "Input should be a multiple of 4. Received: 6."),
        (
            "model={towers=['sequence'], sequence_heads=3}",
            "sequence_heads divides embedding_dim. Received: sequence_heads = 3, embedding_dim = "
            "64. Change either",
        ),
        (
            "prepare={train_rows='windows', events={paths=['x'], label='y'}}",
            'train_rows = "windows" is for positive events in order of time. Received: '
            'events.time missing, events.label. Use train_rows = "events"',
        ),
        ("model.towers=[]", "towers names each tower once, and at least one. Received: []"),
        ("prepare.split.test_share=0.95", "Received: 0.1 + 0.95. Make them smaller"),
        (
            "prepare.split.test_paths=['x']",
            "split.test_paths is for method = 'given'. Received: test_paths = ('x',) with method = "
            "'leave_one_out'. Remove it, or change method",
        ),
        (
            "prepare.split={method='temporal', valid_time=9, test_time=8}",
            "split.valid_time must not lie after split.test_time. Received: 9 and 8. Exchange them",
        ),
        ("prepare.events.split='s'", 'events.split is for split.method = "given". Received: '),
        (
            "prepare.events.context=[{column='a', kind='categorical', num_buckets=9}]",
            "num_buckets is for number and text and hashed. Received: num_buckets = 9 with kind = "
            "'categorical'. Remove it, or change kind",
        ),
        (
            "prepare.events.context=[{column='price.usd', kind='number'}]",
            "letters, digits, _ and -. Received: 'price.usd'. Set name",
        ),
        (
            "prepare.events.context=[{column='A', kind='text'}, {column='a', kind='text'}]",
            "feature names of one side differ. Received twice: ['a'] (context). Set name",
        ),
        (
            "sharding.hot_rows={user='some'}",
            'hot_rows is "auto", or for each table "auto" or a number of rows from 0 on. Received: '
            "{'user': 'some'}. (sharding.hot_rows in",
        ),
        ("sharding.hot_rows={user='auto', item=-1}", "{'user': 'auto', 'item': -1}"),
        ("sharding.hot_rows=3", "from 0 on. Received: 3. (sharding.hot_rows in"),
        ("sharding.precision=bf16", "Input should be 'fp32' or 'fp16'. Received: 'bf16'."),
        (
            "sharding.compress.item={method='quotient_remainder', num_buckets=9, num_hashes=3}",
            "num_hashes is for method = 'hash'. Received: num_hashes = 3 with method = "
            "'quotient_remainder'. Remove it, or change method. (sharding.compress.item in ",
        ),
        (
            "sharding.compress.item={method='hash', num_buckets=9, operation='product'}",
            "operation is for method = 'quotient_remainder'. Received: operation = 'product'",
        ),
        (
            "sharding.compress.item={method='hash', num_bucket=9}",
            "unknown key 'sharding.compress.item.num_bucket' in "
            f"{MOVIELENS}. Did you mean 'num_buckets'?",
        ),
        ("launch.hosts=['a:1']", "Received: num_ranks = 2, 1 slots in ['a:1']"),
        ("prepare.events.header=false", "csv without a header needs column_names"),
        ("train", "--set takes key=value. Received: 'train'."),
        ("seed.x=1", "'seed' is a value, not a section"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    overrides = [override] if not override.startswith("seed.x") else ["seed=1", override]
    with pytest.raises(ConfigError) as caught:
        load_config(MOVIELENS, overrides)
    assert message in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(MOVIELENS, ["train.max_epochs=0", "score.k=0"])
    assert "train.max_epochs" in str(caught.value)
    assert "score.k" in str(caught.value)


def test_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no configuration file .*none\.toml"):
        load_config(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("name = [")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load_config(bad)
    empty = tmp_path / "empty.toml"
    empty.write_text('name = "x"')
    with pytest.raises(ConfigError, match="key 'prepare' is required in"):
        load_config(empty)


def test_section_hash_changes_with_its_sections_only() -> None:
    base = load_config(MOVIELENS)
    other = load_config(MOVIELENS, ["score.k=7"])
    assert section_hash(base, "train", "model") == section_hash(other, "train", "model")
    assert section_hash(base, "score") != section_hash(other, "score")


def test_training_leaves_out_what_lists_leave_out() -> None:
    hashes = set()
    for expected, overrides in {
        True: [[], ["loss.exclude_seen=true"], ["loss.exclude_seen=true", REPEATS]],
        False: [["loss.exclude_seen=false"], ["evaluate.exclude_seen=false"], [REPEATS]],
    }.items():
        configs = [load_config(MOVIELENS, keys) for keys in overrides]
        assert [config.trains_without_seen for config in configs] == [expected] * 3
        # what computes the same goes on from the same checkpoint
        found = {resume_hash(config) for config in configs}
        assert len(found) == 1
        hashes |= found
    assert len(hashes) == 2


def test_l2_by_table_is_part_of_what_a_run_computes() -> None:
    runs = [[], ["loss.table_l2={}"], ["loss.table_l2={user=0.1}"], ["loss.table_l2={item=0.1}"]]
    hashes = [resume_hash(load_config(MOVIELENS, keys)) for keys in runs]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_reference_is_current_and_documents_every_key() -> None:
    text = reference()
    assert (ROOT / "docs" / "configuration.md").read_text() == text, "run: make docs"
    assert not [line for line in text.splitlines() if line.startswith("| `") and "|  |" in line]
