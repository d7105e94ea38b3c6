"""Checkpoints that were damaged, mixed up or forged; evaluate opens them as score does."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distrec.files import sha256
from tests.bad_inputs.case import CHECKPOINT, DATA, Case
from tests.bad_inputs.datasets import Payload
from tests.bad_inputs.datasets import manifest as dataset_manifest
from tests.synthetic import write_dataset

STEP = "step-00000002"
DENSE = "dense.safetensors"
SHARD = "tables/user/shard-00001-of-00001.safetensors"


def path_of(run: Path, name: str = "") -> Path:
    return run / "checkpoints" / STEP / name


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits the manifest."""

    def make(run: Path) -> None:
        document = json.loads(path_of(run, "manifest.json").read_text())
        change(document)
        path_of(run, "manifest.json").write_text(json.dumps(document))

    return make


def file(content: Callable[[Path, bytes], bytes], name: str = DENSE) -> Callable[[Path], None]:
    """Puts something else into a file; size and checksum of the manifest are those of that."""

    def make(run: Path) -> None:
        path = path_of(run, name)
        path.write_bytes(content(run, path.read_bytes()))
        agree(run, name)

    return make


def agree(run: Path, name: str) -> None:
    path = path_of(run, name)

    def change(document: dict[str, Any]) -> None:
        is_dense = name == DENSE
        entry = document["dense"] if is_dense else document["tables"]["user"]["shards"][0]
        entry |= {"num_bytes": path.stat().st_size, "sha256": sha256(path)}

    manifest(change)(run)


def tensors(change: Callable[[dict[str, Any]], Any], name: str = DENSE) -> Callable[[Path], None]:
    """Edits the tensors of a file, which stays a whole one."""

    def make(run: Path) -> None:
        held = load_file(path_of(run, name))
        change(held)
        save_file(held, path_of(run, name))
        agree(run, name)

    return make


def damage(change: Callable[[bytes], bytes], name: str = DENSE) -> Callable[[Path], None]:
    """Spoils a file; the manifest is as it was."""
    return lambda run: (
        path_of(run, name).write_bytes(change(path_of(run, name).read_bytes())) and None
    )


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def link(run: Path) -> None:
    path_of(run, DENSE).rename(run / "elsewhere")
    path_of(run, DENSE).symlink_to(run / "elsewhere")


def other_dataset(run: Path) -> None:
    shutil.rmtree(run / "dataset")
    write_dataset(run / "dataset", num_users=61)


def best(text: str) -> Callable[[Path], None]:
    return lambda run: (run / "checkpoints" / "best.json").write_text(text) and None


def manifest_text(text: str) -> Callable[[Path], None]:
    return lambda run: path_of(run, "manifest.json").write_text(text) and None


def flip_in(split: str) -> Callable[[Path], None]:
    """Spoils the one file of a split of the dataset."""

    def make(run: Path) -> None:
        path = run / "dataset" / split / "part-00000.parquet"
        path.write_bytes(flipped(path.read_bytes()))

    return make


def no_test_queries(document: dict[str, Any]) -> None:
    document["splits"]["test_queries"] = {"num_rows": 0, "files": []}


def header(length: int, text: bytes = b"{}") -> Callable[[Path, bytes], bytes]:
    return lambda run, data: struct.pack("<Q", length) + text


def model(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["config"]["model"].update(keys)


def refused(name: str, make: Callable[[Path], None], message: str, code: int = CHECKPOINT) -> Case:
    return Case(name, "evaluate", make, message, code)


HUGE = json.dumps(
    {"parameter/x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
).encode()
CASES = (
    refused("no checkpoints", lambda run: shutil.rmtree(run / "checkpoints"), "Train first"),
    refused("a checkpoint without manifest", lambda run: path_of(run, "manifest.json").unlink(),
            "a checkpoint has a manifest.json, written last"),
    refused("half a best.json", best('{"checkp'), "best.json names the best checkpoint"),
    refused("a JSON bomb as best.json", best("[" * 200_000), "best.json names the best checkpoint"),
    refused("../ in best.json", best('{"checkpoint": "../../x"}'), "names the best checkpoint"),
    refused("half a manifest", manifest_text('{"fo'),
            "is not a checkpoint's manifest"),
    refused("a JSON bomb as manifest",
            manifest_text('{"a":' * 99_999),
            "is not a checkpoint's manifest: maximum recursion depth"),
    refused("a checkpoint of format 999", manifest(lambda d: d.update(format_version=999)),
            "reads checkpoints of format 1 and 2. Received: format 999"),
    refused("a delta without a base", manifest(lambda d: d.update(format_version=2)),
            "deltas, and no others, are of format 2"),
    refused("an unknown key in a manifest", manifest(lambda d: d.update(more=1)), "Extra inputs"),
    refused("../ in a manifest", manifest(lambda d: d["dense"].update(path="../../x")),
            "String should match pattern"),
    refused("an absolute path in a manifest", manifest(lambda d: d["dense"].update(path="/etc/a")),
            "String should match pattern"),
    refused("../ as name of a table",
            manifest(lambda d: d["tables"].update({"..": d["tables"].pop("user")})),
            "a table has a name that does not start with '.'"),
    refused("a table of 2^50 rows",
            manifest(lambda d: d["tables"]["user"].update(num_embeddings=2**50)), "less than"),
    refused("fewer rows than a shard has",
            manifest(lambda d: d["tables"]["user"]["shards"][0].update(num_rows=3)),
            "shard 0 of 1 holds 62 of 62 rows. Received: 3 rows"),
    refused("another width than a shard has",
            manifest(lambda d: d["tables"]["user"].update(embedding_dim=4)),
            "weights of ... has shape (62, 4) ... Received: (62, 8)"),
    refused("another precision than a shard has",
            manifest(lambda d: d["tables"]["user"].update(precision="fp16")), "torch.float16"),
    refused("a missing file", lambda run: path_of(run, DENSE).unlink(),
            "every file of the manifest is there. Received: no file ...dense.safetensors"),
    refused("a link for a file", link, "holds no links. Received: ...dense.safetensors is one"),
    refused("a file cut short", damage(lambda data: data[:-4]),
            "a file has the size that the manifest gives. Received: ...dense.safetensors with"),
    refused("one flipped bit", damage(flipped), "a file has the SHA-256 that the manifest gives"),
    refused("one flipped bit in a table", damage(flipped, SHARD),
            "a file has the SHA-256 that the manifest gives. Received: ...tables/user/shard-00001"),
    refused("an empty file", file(lambda run, data: b""), "dense.safetensors is damaged: "),
    refused("a pickle in place of safetensors", file(lambda run, data: pickle.dumps(Payload(run))),
            "dense.safetensors is damaged: "),
    refused("a 10 GB header", file(header(10 * 2**30)), "dense.safetensors is damaged: "),
    refused("a tensor larger than its file", file(header(len(HUGE), HUGE)), "is damaged: "),
    refused("a JSON bomb as header", file(header(200_000, b"[" * 200_000)), "is damaged: "),
    refused("trailing bytes", file(lambda run, data: data + b"more"), "is damaged: "),
    refused("a tensor less", tensors(lambda held: held.pop("parameter/global_bias")),
            "a checkpoint fits the model it is loaded into. Received: parameter/global_bias"),
    refused("a tensor more", tensors(lambda held: held.update({"parameter/x": torch.ones(2)})),
            "a checkpoint fits the model it is loaded into. Received: parameter/x"),
    refused("a tensor of another type",
            tensors(lambda held: held.update({"parameter/global_bias": torch.ones(1).bool()})),
            "parameter/global_bias of ... Received: ... BOOL"),
    refused("a checkpoint of another model", manifest(model(gate_hidden=5)),
            "a checkpoint fits the model it is loaded into"),
    refused("a model of 17 GB", manifest(model(deep_hidden=[65536, 65536])),
            "a checkpoint fits the model it is loaded into"),
    refused("an unknown tower", manifest(model(towers=["cf", "magic"])),
            "holds the section [model] that it was trained with"),
    refused("no model in a manifest", manifest(lambda d: d.update(config={})),
            "holds the section [model] that it was trained with"),
    refused("a checkpoint of another dataset", other_dataset,
            "differ in vocabulary 'user_id', num_users"),
    refused("another vocabulary",
            dataset_manifest(lambda d: d["vocabularies"]["item_id"].update(sha256="0" * 64)),
            "differ in vocabulary 'item_id'"),
    refused("one flipped bit in test queries", flip_in("test_queries"),
            "a file has the SHA-256 that the manifest gives. Received: ...test_queries/part-00000",
            DATA),
    Case("one flipped bit in users", "score", flip_in("users"),
         "a file has the SHA-256 that the manifest gives. Received: ...users/part-00000", DATA),
    Case("one flipped bit in a checkpoint", "score", damage(flipped),
         "a file has the SHA-256 that the manifest gives. Received: ...dense.safetensors",
         CHECKPOINT),
    refused("no test queries",
            dataset_manifest(no_test_queries),
            "evaluate needs test queries. Received: none", DATA),
)  # fmt: skip
