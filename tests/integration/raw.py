"""Raw files with a planted signal, as a user would bring them."""

from __future__ import annotations

import random
from pathlib import Path

NUM_GROUPS = 4

CONFIG = """
name = "planted"
output = "{output}"

[prepare]
history_length = 10

[prepare.events]
paths = ["{raw}/events.csv"]
time = "time"

[prepare.items]
paths = ["{raw}/items.csv"]
id = "item_id"
title = "title"
features = [{{ column = "genres", kind = "multi_categorical" }}]

[prepare.users]
paths = ["{raw}/users.csv"]
id = "user_id"
features = [{{ column = "age", kind = "number" }}]

[model]
embedding_dim = 16
autoencoder_hidden = [32]
deep_hidden = [16]

[train]
global_batch_size = 128
max_epochs = 8
warmup_steps = 5

[evaluate]
ks = [5, 10]

[score]
k = 5

[sharding]
placement = "row_wise"

[launch]
num_ranks = 2
timeout_seconds = 60

[spark]
driver_memory = "1g"
shuffle_partitions = 4
"""


def write_raw(raw: Path, output: Path, num_users: int = 120, num_items: int = 60) -> Path:
    """Write events, items, users and the configuration; users stay in their group of items.

    Returns:
        Path of the configuration.
    """
    rng = random.Random(7)
    raw.mkdir(parents=True, exist_ok=True)
    groups = {item: item % NUM_GROUPS for item in range(num_items)}
    lines = []
    for user in range(num_users):
        own = [item for item, group in groups.items() if group == user % NUM_GROUPS]
        taken = rng.sample(range(num_items), 2) + rng.sample(own, 10)
        start = 1_600_000_000 + rng.randrange(1_000_000)
        lines += [
            f"u{user},i{item},{start + 60 * k}" for k, item in enumerate(dict.fromkeys(taken))
        ]
    rng.shuffle(lines)
    (raw / "events.csv").write_text("\n".join(["user_id,item_id,time", *lines]) + "\n")
    items = [f'i{item},"Film {item}, part",g{group}|all' for item, group in groups.items()]
    items.append("cold,Never seen,g1|all")
    (raw / "items.csv").write_text("item_id,title,genres\n" + "\n".join(items) + "\n")
    users = [f"u{user},{20 + user % 40}" for user in range(num_users)]
    (raw / "users.csv").write_text("user_id,age\n" + "\n".join(users) + "\n")
    path = raw / "planted.toml"
    path.write_text(CONFIG.format(raw=raw, output=output))
    return path
