"""Secrets that somebody wrote into [spark.conf]: Spark gets them, and nothing that is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pyspark import SparkContext
from typer.testing import CliRunner

from distrec import pipeline, spark
from distrec.cli import app
from distrec.config import Config, dump_config, load_config
from distrec.config.secrets import MASK, mask_setting
from distrec.errors import ConfigError
from distrec.trainer.identity import resume_hash
from distrec.variants import derived

SECRET = "hunter2"
CONF = {
    "spark.hadoop.fs.s3a.secret.key": SECRET,
    "spark.driver.extraJavaOptions": f"-Xss4m -Dstore.password={SECRET}",
    "spark.jdbc": f"jdbc:x://me:{SECRET}@host/base",
    "spark.executor.memory": "2g",
}
TOML = f"""
name = "shop"
prepare.events = {{ paths = ["none.csv"], time = "t" }}
[spark.conf]
{"".join(f'"{key}" = "{value}"' + chr(10) for key, value in CONF.items())}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "shop.toml"
    file.write_text(f'output = "{tmp_path}/run"\n{TOML}')
    return file


@pytest.fixture
def config(path: Path) -> Config:
    return load_config(path)


@pytest.mark.parametrize(
    ("key", "is_hidden"),
    [
        ("spark.hadoop.fs.s3a.access.key", True),
        ("spark.hadoop.fs.azure.account.key.mine", True),
        ("spark.ssl.keyPassword", True),
        ("spark.hadoop.fs.s3a.session.token", True),
        ("spark.authenticate.secret", True),
        ("spark.some.apiKey", True),
        ("spark.authenticate", False),
        ("spark.ssl.keyStore", False),
        ("spark.io.encryption.keySizeBits", False),
        ("spark.hadoop.security.credential.provider.path", False),
        ("spark.executor.memory", False),
    ],
)
def test_which_settings_are_hidden(key: str, is_hidden: bool) -> None:
    assert mask_setting(key, "x") == (MASK if is_hidden else "x")


def test_no_copy_of_a_configuration_has_them(path: Path, config: Config) -> None:
    pipeline.run_stages(config, only=())
    copy = (config.directory / "config.toml").read_text()
    shown = CliRunner().invoke(app, ["config", str(path)])
    assert shown.exit_code == 0
    for text in (copy, shown.output, repr(config), config.model_dump_json()):
        assert SECRET not in text
    for text in (copy, shown.output):
        assert f'"spark.hadoop.fs.s3a.secret.key" = "{MASK}"' in text
        assert f'"-Xss4m -Dstore.password={MASK}"' in text
        assert f'"jdbc:x://{MASK}@host/base"' in text
        assert '"spark.executor.memory" = "2g"' in text


def test_a_copy_is_the_same_configuration(config: Config, tmp_path: Path) -> None:
    (tmp_path / "copy.toml").write_text(dump_config(config))
    copy = load_config(tmp_path / "copy.toml")
    assert copy != config
    assert dump_config(copy) == dump_config(config)
    assert resume_hash(copy) == resume_hash(config)
    for stage in pipeline.STAGES:
        outputs = dict.fromkeys(stage.inputs, "x")
        assert pipeline.stage_key(stage, copy, outputs) == pipeline.stage_key(
            stage, config, outputs
        )


def test_spark_gets_them_and_is_not_started_without(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # another test of this process may have started Spark
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    # a trial of a search is a run that starts Spark, too
    for one in (config, derived(config, tmp_path / "trial", {"train.max_epochs": 1})):
        options = spark._builder(one, "prepare", submitted=False)._options
        assert {key: options[key] for key in CONF} == CONF
    (tmp_path / "copy.toml").write_text(dump_config(config))
    copy = load_config(tmp_path / "copy.toml")
    for key in ("spark.hadoop.fs.s3a.secret.key", "spark.driver.extraJavaOptions", "spark.jdbc"):
        conf = {key: copy.spark.conf[key]}
        one = copy.model_copy(update={"spark": copy.spark.model_copy(update={"conf": conf})})
        with pytest.raises(ConfigError, match=rf"as they are\. Received: spark\.conf has {key} = "):
            spark._builder(one, "prepare", submitted=False)


@pytest.mark.parametrize(
    "line",
    [
        # without quotes, a table in a table
        f'spark.my.password = "{SECRET}"',
        f'"spark.my.password" = ["{SECRET}"]',
        f'"spark.my.options" = {{ secret = "{SECRET}" }}',
    ],
)
def test_messages_do_not_repeat_them(line: str, path: Path) -> None:
    path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError, match=re.escape(MASK)) as refused:
        load_config(path)
    assert SECRET not in str(refused.value)


def test_an_override_that_is_refused_is_not_repeated(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set name\.password: 'name' is a value") as refused:
        load_config(path, [f"name.password={SECRET}"])
    assert SECRET not in str(refused.value)
