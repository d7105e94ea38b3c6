"""Which keys of the configuration decide what a run computes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from distrec.config import Config

TRAINED_SECTIONS = ("model", "loss", "train", "sharding", "reader")
# keys that change how a run is done or shown, not what it computes: a resumed run may change them
FREE_KEYS: dict[str, tuple[str, ...]] = {
    "train": (
        "resume", "log_every_steps", "keep_checkpoints", "keep_earlier_runs",
        "checkpoint_every_steps", "full_checkpoint_every",
        "early_stopping_patience", "on_bad_loss", "bad_loss_above", "max_skipped_steps",
    ),
    "reader": ("prefetch_batches", "cache_mib", "verify", "lanes"),
    "sharding": (
        "placement", "replicate_below_mib", "tables", "hot_rows", "prefetch_ids", "cpu_offload",
    ),
}  # fmt: skip
TASK_KEYS = ("multi_task", "experts", "expert_hidden", "expert_layers")
# where the run ends: part of the learning rate's decay, if there is one
END_KEYS = ("max_epochs", "max_steps")


def resume_hash(config: Config) -> str:
    """SHA-256 of what must be equal for a run to go on from a checkpoint."""
    dumped = config.model_dump(mode="json")
    chosen: dict[str, Any] = {"seed": config.seed}
    for name in TRAINED_SECTIONS:
        free = FREE_KEYS.get(name, ())
        if name == "train" and config.train.warm_start is None:
            # a run without one is what it was before there was this key
            free += ("warm_start",)
        if name == "train" and not config.train.predict_new_rows:
            free += ("predict_new_rows",)
        if name == "model" and not config.model.frozen:
            free += ("frozen", "adapter_rank")
        if name == "model" and not config.model.tower_weights:
            free += ("tower_weights",)
        for key in ("new_item_bias", "recent_weight"):
            if name == "model" and dumped[name][key] == 0:
                free += (key,)
        if name == "loss":
            dumped[name]["exclude_seen"] = config.trains_without_seen
            free += () if config.trains_without_seen else ("exclude_seen",)
            free += () if config.loss.table_l2 else ("table_l2",)
        if name == "train" and not config.train.fit_tower_weights:
            free += ("fit_tower_weights",)
        if config.model.multi_task == "none":
            free += {"model": TASK_KEYS, "loss": ("task_weights",)}.get(name, ())
        if name == "train" and config.train.average_decay == 0:
            free += ("average_decay",)
        # noise is found for a number of steps
        if name == "train" and config.train.decay == "none" and config.privacy is None:
            free += END_KEYS
        if name == "train" and config.sharding.prefetch_rows:
            # after a checkpoint rows are looked up anew
            free = tuple(key for key in free if key != "checkpoint_every_steps")
        if name == "sharding" and not config.sharding.prefetch_rows:
            free += ("prefetch_rows",)
        if name == "sharding" and config.sharding.exchange_precision == "fp32":
            # computes what a run did before there was this key
            free += ("exchange_precision",)
        if name == "sharding" and not config.sharding.compress:
            free += ("compress",)
        chosen[name] = {key: value for key, value in dumped[name].items() if key not in free}
    if config.privacy is not None:
        chosen["privacy"] = dumped["privacy"]
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
