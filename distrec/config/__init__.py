"""The configuration: one TOML file for every job, typed, refused as a whole before anything starts.

Each section is a frozen class; the text under a key is its documentation, from which
``docs/configuration.md`` is generated. A key that is left out has the default given here.
"""

from distrec.config.data import PrepareConfig, SplitConfig
from distrec.config.model import LossConfig, ModelConfig, NegativesSource
from distrec.config.privacy import PrivacyConfig
from distrec.config.reading import dump_config, load_config, parse_config, section_of
from distrec.config.section import Section
from distrec.config.serving import (
    EvaluateConfig,
    LaunchConfig,
    ReportConfig,
    ScoreConfig,
    SparkConfig,
)
from distrec.config.sources import EventsConfig, FeatureConfig, Source, TableConfig
from distrec.config.training import (
    CompressionConfig,
    ReaderConfig,
    ShardingConfig,
    TrainConfig,
)
from distrec.config.tuning import RangeConfig, TuneConfig
from distrec.config.whole import Config, section_hash

__all__ = [
    "CompressionConfig",
    "Config",
    "EvaluateConfig",
    "EventsConfig",
    "FeatureConfig",
    "LaunchConfig",
    "LossConfig",
    "ModelConfig",
    "NegativesSource",
    "PrepareConfig",
    "PrivacyConfig",
    "RangeConfig",
    "ReaderConfig",
    "ReportConfig",
    "ScoreConfig",
    "Section",
    "ShardingConfig",
    "Source",
    "SparkConfig",
    "SplitConfig",
    "TableConfig",
    "TrainConfig",
    "TuneConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "section_hash",
    "section_of",
]
