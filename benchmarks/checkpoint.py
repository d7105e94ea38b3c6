"""MB/s of saving and loading a table beside sequential I/O of the same bytes on the same disk.

    python benchmarks/checkpoint.py [--mib 256] [--rounds 5] [--directory .] [--quick]

One process. Saving (written, hashed, fsynced, committed) takes turns with writing as many bytes
from memory to a file and fsync; loading, the files' pages dropped from the cache before, with
reading the same files into one buffer. The SHA-256 of a checkpoint that is looked for
(`checkpoint.find`) is no part of loading. Peak extra memory is the largest resident size beyond
that before. Medians count.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    alternate,
    at_least,
    at_most,
    medians,
    parser,
    print_header,
    print_result,
    seconds,
)

from distrec import checkpoint
from distrec.config import ShardingConfig
from distrec.model import ModelSpec
from distrec.sharding.collectives import OneProcess
from distrec.sharding.plan import TableSpec, plan_tables
from distrec.sharding.tables import EmbeddingTables

_BLOCK = 4 * 2**20
_WIDTH = 64
SPEC = ModelSpec(
    features=(), num_users=3, num_trained_items=3, num_items=3, history_length=3, has_labels=False
)


class Sides:
    """Both ways of writing and reading `mib` MiB of rows and optimizer state.

    Args:
        mib: Size of the table with its state.
        folder: Empty, on the disk to be measured.
    """

    def __init__(self, mib: int, folder: Path) -> None:
        sharding = ShardingConfig(optimizer="adagrad")
        collectives = OneProcess(torch.device("cpu"))
        plans = plan_tables([TableSpec("table", mib * 2**20 // (8 * _WIDTH), _WIDTH)], sharding, 1)
        tables = EmbeddingTables(plans, collectives, sharding, 1, collectives.device)
        _, self.weights, self.state = tables.local_rows("table")
        # pages of zeros that nobody has touched would cost nothing
        self.state.uniform_()
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters())
        self._parts = checkpoint.Parts(model, optimizer, tables, plans, sharding)
        self._collectives = collectives
        self._folder = folder
        self.path = folder / checkpoint.checkpoint_name(1)
        self.num_bytes = self.weights.numel() * 4 + self.state.numel() * 4

    def save(self) -> None:
        """Ours."""
        identity = checkpoint.Identity(1, {}, "c", "d", {}, SPEC)
        position = checkpoint.Position(1, 0, 1, 1)
        checkpoint.save(self._folder, identity, position, self._parts, self._collectives)

    def load(self) -> None:
        """Ours."""
        parts = self._parts
        world = self._collectives.world
        checkpoint.load_tables(self.path, parts.tables, parts.plans, parts.sharding, world)

    def write(self) -> None:
        """The same bytes, one after the other, as dd would."""
        with (self._folder / "plain").open("wb", buffering=0) as file:
            for tensor in (self.weights, self.state):
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), _BLOCK):
                    file.write(data[start : start + _BLOCK])
            os.fsync(file.fileno())

    def read(self) -> None:
        """The checkpoint's files, one after the other, as dd would."""
        buffer = bytearray(_BLOCK)
        for path in self._files():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):  # type: ignore[attr-defined]
                    pass

    def clear(self) -> None:
        """Take away what was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        (self._folder / "plain").unlink(missing_ok=True)

    def forget(self) -> None:
        """Drop the checkpoint's pages from the cache: the disk is read."""
        for path in self._files():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _files(self) -> list[Path]:
        return sorted(self.path.rglob("*.safetensors"))


def timed(before: Callable[[], None], function: Callable[[], None]) -> Callable[[], float]:
    """Seconds of `function`, after what is not measured."""

    def run() -> float:
        before()
        return seconds(function)

    return run


def peak_extra_mib(function: Callable[[], None]) -> float:
    """Largest resident size while it ran beyond that before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}: peak memory is measured on Linux")


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, 5, "64 MiB")
    options.add_argument("--mib", type=int, default=256, help="of rows and optimizer state")
    options.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    arguments = options.parse_args()
    mib = 64 if arguments.quick else arguments.mib
    torch.set_num_threads(1)
    print_header(["torch", "safetensors"], "1 process, and 1 thread that hashes while it saves")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        sides = Sides(mib, Path(name))
        # buffers that are made once, and the disk's first blocks
        sides.save()
        sides.load()
        memory = {"save": peak_extra_mib(sides.save), "load": peak_extra_mib(sides.load)}
        written = alternate(
            {"ours": timed(sides.clear, sides.save), "plain": timed(sides.clear, sides.write)},
            arguments.rounds,
        )
        sides.save()
        read = alternate(
            {"ours": timed(sides.forget, sides.load), "plain": timed(sides.forget, sides.read)},
            arguments.rounds,
        )
    figures: dict[str, float | int] = {"mib": mib, "rounds": arguments.rounds}
    for kind, times in (("write", medians(written)), ("read", medians(read))):
        for side, took in times.items():
            figures[f"{kind}_{side}_mb_per_second"] = round(sides.num_bytes / took / 1e6, 1)
        figures[f"{kind}_ratio"] = round(times["plain"] / times["ours"], 3)
        print(
            f"{kind:5}  ours {figures[f'{kind}_ours_mb_per_second']:.0f} MB/s, plain "
            f"{figures[f'{kind}_plain_mb_per_second']:.0f} MB/s: {figures[f'{kind}_ratio']:.2f}"
        )
    for kind, value in memory.items():
        figures[f"{kind}_peak_extra_mib"] = round(value, 1)
        print(f"{kind}   peak extra memory {value:.1f} MiB of {mib}")
    bars = {"write_ratio": at_least(0.6), "read_ratio": at_least(0.6)}
    bars |= {"save_peak_extra_mib": at_most(64), "load_peak_extra_mib": at_most(64)}
    print_result("checkpoint", figures, bars)


if __name__ == "__main__":
    main()
