"""The towers by name, in the order in which their vectors stand side by side."""

from __future__ import annotations

from collections.abc import Mapping

from distrec.config import ModelConfig
from distrec.model.autoencoder import AutoencoderTower, VariationalTower
from distrec.model.content import ContentTower
from distrec.model.sequence import SequenceTower
from distrec.model.towers import CollaborativeTower, DeepTower, Tower

TOWERS: Mapping[str, type[Tower]] = {
    "cf": CollaborativeTower,
    "autoencoder": AutoencoderTower,
    "sequence": SequenceTower,
    "deep": DeepTower,
    "content": ContentTower,
}


def tower_class(name: str, config: ModelConfig) -> type[Tower]:
    """The class of a tower that is on."""
    if name == "autoencoder" and config.autoencoder_kl:
        return VariationalTower
    return TOWERS[name]
