"""How ranks talk: named collectives over Horovod, or none at all on one process.

The only file that imports Horovod, and only once it is to start, so that a package without it
trains on one process. Every call has a name and is checked before it is sent. Every rank makes the
same calls. Nothing that arrives is unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from distrec.config import LaunchConfig
from distrec.errors import LaunchError, RankLostError
from distrec.world import World

Operation = Literal["sum", "max", "min"]
Exchanged = tuple[Tensor, list[int]]
Result = TypeVar("Result")

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# integers of the same width, for types that Horovod refuses to carry
_CARRIERS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
_SUMMABLE = {torch.int32, torch.int64, torch.float16, torch.float32, torch.float64}
# name by which a launcher (horovodrun, Spark, mpirun) tells a process that it is a rank
_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_CAUSES = (
    ("timed out", "a rank is stuck or very slow. Look at its log; raise launch.timeout_seconds if "
     "it was only slow"),
    ("mismatched", "the ranks ask for different things: they run different code, configuration or "
     "data. Start them all from the same files"),
    ("connection", "another rank died. Its own log says why: out of memory, a signal, an error"),
    ("read error", "another rank died. Its own log says why: out of memory, a signal, an error"),
    ("shut down", "another rank ended or failed first. Its own log says why"),
)  # fmt: skip


class Collectives(ABC):
    """What ranks do together. Every rank calls the same, with the same names.

    Args:
        world: The place of this process.
        device: Where its tensors live.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.world = world
        self.device = device

    @abstractmethod
    def start_alltoall(
        self, tensor: Tensor, send_counts: Sequence[int], name: str
    ) -> Callable[[], Exchanged]:
        """As `alltoall`, but returns at once; the result is what the returned function waits for.

        Several under way at a time need different names.
        """

    @abstractmethod
    def start_allreduce(
        self, tensor: Tensor, name: str, op: Operation = "sum", in_place: bool = False
    ) -> Callable[[], Tensor]:
        """As `allreduce`, but returns at once; with `in_place` it may overwrite the tensor."""

    @abstractmethod
    def start_allgather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """As `allgather`, but returns at once."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> Tensor:
        """The tensor of rank `root`; the shape and type are the same on every rank."""

    @abstractmethod
    def shutdown(self) -> None:
        """Leave. A rank that leaves while others wait makes them fail, which is meant."""

    def alltoall(self, tensor: Tensor, send_counts: Sequence[int], name: str) -> Exchanged:
        """Send consecutive rows to each rank and receive what the ranks send here.

        Args:
            tensor: (n, ...); the same type and row shape on every rank.
            send_counts: Rows for each rank, in rank order; their sum is n.
            name: Of this call.

        Returns:
            The received rows, rank 0's first, and how many came from each rank.
        """
        return self.start_alltoall(tensor, send_counts, name)()

    def allgather(self, tensor: Tensor, name: str) -> Tensor:
        """Concatenate along the first dimension, rank 0 first; lengths may differ.

        Args:
            tensor: (n, ...); a scalar counts as (1,).
            name: Of this call.
        """
        return self.start_allgather(tensor, name)()

    def allreduce(self, tensor: Tensor, name: str, op: Operation = "sum") -> Tensor:
        """Element by element over ranks. Not in place. A bool is allowed for max and min."""
        return self.start_allreduce(tensor, name, op)()

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """What JSON can hold, from every rank to every rank, in rank order."""
        data = _to_bytes(value)
        lengths = self.allgather(torch.tensor([len(data)]), f"{name} (lengths)").tolist()
        joined = self.allgather(data, name).numpy().tobytes()
        starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
        return [
            json.loads(joined[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]

    def broadcast_object(self, value: Any, name: str, root: int = 0) -> Any:
        """What JSON can hold, from rank `root` to every rank; the others' value is not read."""
        own = self.world.rank == root
        data = _to_bytes(value) if own else torch.empty(0, dtype=torch.uint8)
        length = int(self.broadcast(torch.tensor(len(data)), f"{name} (length)", root))
        if not own:
            data = torch.empty(length, dtype=torch.uint8)
        return json.loads(self.broadcast(data, name, root).numpy().tobytes())

    def broadcast_parameters(self, named: Mapping[str, Tensor], root: int = 0) -> None:
        """Overwrite every tensor by rank `root`'s, in place; for example a state_dict."""
        for name in sorted(named):
            tensor = named[name].detach()
            tensor.copy_(self.broadcast(tensor, f"parameter {name}", root))

    def barrier(self, name: str) -> None:
        """Wait until every rank is here."""
        self.allreduce(torch.zeros(1), f"barrier {name}")


class OneProcess(Collectives):
    """The collectives of a single process: everything is sent to itself.

    Args:
        device: Where its tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(World(), device)

    def start_alltoall(
        self, tensor: Tensor, send_counts: Sequence[int], name: str
    ) -> Callable[[], Exchanged]:
        """Hands the tensor back."""
        _check_counts(tensor, send_counts, 1, name)
        return lambda: (tensor.contiguous(), [len(tensor)])

    def start_allreduce(
        self, tensor: Tensor, name: str, op: Operation = "sum", in_place: bool = False
    ) -> Callable[[], Tensor]:
        """Hands a copy back, or the tensor."""
        _check_reducible(tensor, op, name)
        return (lambda: tensor) if in_place else tensor.clone

    def start_allgather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Hands a copy back."""
        return torch.atleast_1d(tensor).clone

    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> Tensor:
        """Hands a copy back."""
        assert root == 0, root
        return tensor.clone()

    def shutdown(self) -> None:
        """Nothing to leave."""


class HorovodCollectives(Collectives):
    """Collectives over Horovod: Gloo on CPU, NCCL on GPU.

    Args:
        launch: Section [launch].

    Raises:
        LaunchError: Horovod is not there, or the ranks do not find each other.
    """

    def __init__(self, launch: LaunchConfig) -> None:
        # a waiting rank gives up after this; the launcher's own setting goes before
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(launch.timeout_seconds))
        if not _uses_gpu(launch):
            # tensors that are summed in one buffer change the order of each other's additions, by
            # chance from three ranks on: a resumed run would not be bit for bit the same
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        try:
            import horovod.torch as hvd  # not at the top: one process trains without Horovod
        except ImportError as error:
            raise LaunchError(
                "this process was started as a rank, which needs Horovod. Received: "
                f"{error}. Install it with: python -m distrec.horovod_build"
            ) from error
        self._hvd = hvd
        try:
            hvd.init()
        except Exception as error:
            raise RankLostError(
                f"Horovod could not start: {error}. Check launch.hosts and "
                "launch.network_interfaces."
            ) from error
        world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        super().__init__(world, _device(launch, world))

    def start_alltoall(
        self, tensor: Tensor, send_counts: Sequence[int], name: str
    ) -> Callable[[], Exchanged]:
        """See `Collectives.start_alltoall`."""
        _check_counts(tensor, send_counts, self.world.world_size, name)
        sent = _carried(tensor)
        splits = torch.tensor(list(send_counts), dtype=torch.int32)
        wait = self._begin(
            name, lambda: self._hvd.alltoall_async(sent, splits, name=name), keep=sent
        )

        def finish() -> Exchanged:
            received, counts = wait()
            return received.view(tensor.dtype), counts.tolist()

        return finish

    def start_allreduce(
        self, tensor: Tensor, name: str, op: Operation = "sum", in_place: bool = False
    ) -> Callable[[], Tensor]:
        """See `Collectives.start_allreduce`."""
        _check_reducible(tensor, op, name)
        operation = {"sum": self._hvd.Sum, "max": self._hvd.Max, "min": self._hvd.Min}[op]
        wide = tensor.dtype
        if wide not in _SUMMABLE:
            wide = torch.float32 if tensor.is_floating_point() else torch.int32
        sent = tensor.detach().to(wide).contiguous()
        begin = self._hvd.allreduce_async_ if in_place else self._hvd.allreduce_async
        wait = self._begin(name, lambda: begin(sent, name=name, op=operation), keep=sent)
        return lambda: wait().to(tensor.dtype).reshape(tensor.shape)

    def start_allgather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """See `Collectives.start_allgather`."""
        sent = _carried(torch.atleast_1d(tensor))
        gathered = self._begin(name, lambda: self._hvd.allgather_async(sent, name=name), keep=sent)

        def finish() -> Tensor:
            received: Tensor = gathered()
            return received.view(tensor.dtype)

        return finish

    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> Tensor:
        """See `Collectives.broadcast`."""
        sent = _carried(torch.atleast_1d(tensor))
        wait = self._begin(name, lambda: self._hvd.broadcast_async(sent, root, name=name), sent)
        return wait().view(tensor.dtype).reshape(tensor.shape)

    def shutdown(self) -> None:
        """See `Collectives.shutdown`."""
        self._hvd.shutdown()

    def _begin(self, name: str, start: Callable[[], int], keep: Tensor) -> Callable[[], Any]:
        """Start a collective; the returned function waits for it. `keep` lives until then."""
        handle = self._explained(name, start)

        def wait() -> Any:
            result = self._explained(name, lambda: self._hvd.synchronize(handle))
            # Horovod reads the tensor that was sent until now
            assert keep is not None
            return result

        return wait

    def _explained(self, name: str, function: Callable[[], Result]) -> Result:
        try:
            return function()
        except (self._hvd.HorovodInternalError, ValueError, RuntimeError) as error:
            text = str(error)
            causes = (cause for sign, cause in _CAUSES if sign in text.lower())
            cause = next(causes, "see the logs of the other ranks")
            raise LaunchError(
                f"collective {name!r} failed on rank {self.world.rank} of "
                f"{self.world.world_size}. Likely cause: {cause}. Horovod says: {text}"
            ) from error


def start(launch: LaunchConfig, distributed: bool | None = None) -> Collectives:
    """Join the other ranks, or begin alone.

    Args:
        launch: Section [launch]: device, threads, how long a rank waits.
        distributed: Whether this process is one of Horovod's ranks. None: it is when a launcher
            says so in the environment (horovodrun, horovod.spark, mpirun).

    Raises:
        LaunchError: Horovod is needed and not there, or cannot start; no GPU where cuda is asked.
    """
    torch.set_num_threads(launch.threads_per_rank)
    _keep_freed_memory()
    if distributed is None:
        distributed = any(name in os.environ for name in _RANK_VARIABLES)
    if not distributed:
        return OneProcess(_device(launch, World()))
    ranks = HorovodCollectives(launch)
    if launch.bind_cores:
        _bind_cores(ranks.world)
    return ranks


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, which else is cleared page by page anew.

    Blocks of 32 MiB and more still go back at once. Without effect under another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**29)):
            libc.mallopt(parameter, value)


def _bind_cores(world: World) -> None:
    """Keep this thread, and those that it starts later, to this rank's share of the cores.

    Not Horovod's, which are there already: they work while this one waits, or for a moment, and on
    a core that computes they would wait for the end of a time slice, at every message.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // world.local_size
    if share:
        os.sched_setaffinity(0, cores[world.local_rank * share : (world.local_rank + 1) * share])


def _uses_gpu(launch: LaunchConfig) -> bool:
    return launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())


def _device(launch: LaunchConfig, world: World) -> torch.device:
    if not _uses_gpu(launch):
        return torch.device("cpu")
    if not torch.cuda.is_available() or world.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"each rank of a host needs a GPU of its own. Received: local rank {world.local_rank}, "
            f'{torch.cuda.device_count()} GPUs. Start fewer ranks, or set launch.device = "cpu".'
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def _check_counts(tensor: Tensor, send_counts: Sequence[int], world_size: int, name: str) -> None:
    """Horovod would drop rows in silence, or die, where these do not hold."""
    rows = len(tensor)
    wrong = len(send_counts) != world_size or min(send_counts) < 0 or sum(send_counts) != rows
    if wrong or max(send_counts) >= 2**31:
        raise LaunchError(
            f"alltoall {name!r} sends every row once, to one of {world_size} ranks. Received: "
            f"{rows} rows, send_counts = {list(send_counts)}. This is a fault of the program."
        )


def _check_reducible(tensor: Tensor, op: Operation, name: str) -> None:
    if tensor.dtype == torch.bool and op == "sum":
        raise LaunchError(
            f"allreduce {name!r} cannot sum bool. Received: {tuple(tensor.shape)}. Convert it to "
            "int64, or use max or min."
        )


def _carried(tensor: Tensor) -> Tensor:
    """Contiguous, without graph, of a type that Horovod carries."""
    return tensor.detach().contiguous().view(_CARRIERS.get(tensor.dtype, tensor.dtype))


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
