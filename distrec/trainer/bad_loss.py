"""A loss that is not finite, or explodes: who caused it, the batch set aside, stop or skip.

The numbers that tell it are summed over ranks in every step anyway, so all ranks decide alike and
no good step has an exchange more. In a bad one the ranks say who is guilty and where the batch is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from distrec import columns as c
from distrec.batch import Batch, Jagged
from distrec.config import Config

if TYPE_CHECKING:
    from distrec.trainer.setup import Run


def is_bad(totals: Sequence[float], loss: float, weight: float, config: Config) -> bool:
    """Whether a step must not be applied; the same on all ranks.

    Args:
        totals: Over all ranks, whatever must be finite.
        loss: Sum of the weighted losses over all ranks.
        weight: Sum of the weights.
        config: Of the run.
    """
    bound = config.train.bad_loss_above
    if not all(math.isfinite(total) for total in totals):
        return True
    return bound is not None and weight > 0 and loss / weight > bound


def explain(
    batch: Batch, own: Tensor, totals: Sequence[float], place: str, global_step: int, run: Run
) -> str:
    """What is bad about a step and where its batch lies, once it is set aside. Collective.

    Args:
        batch: This rank's.
        own: Loss and weight of this rank first, and what else was summed.
        totals: Over all ranks.
        place: Where in the data that is.
        global_step: Of the step, counted from 1.
        run: What trains.
    """
    values = own.tolist()
    finite = all(math.isfinite(value) for value in values)
    answers = run.collectives.gather_objects(
        {"finite": finite, "loss": str(values[0]), "weight": str(values[1])}, "train.finite"
    )
    guilty = [
        f"rank {rank} (loss {answer['loss']}, weight {answer['weight']})"
        for rank, answer in enumerate(answers)
        if not answer["finite"]
    ]
    mean = totals[0] / totals[1] if totals[1] else math.nan
    received = ", ".join(guilty) or f"a mean of {mean:.6g} over all ranks"
    where = set_aside(batch, not finite or not guilty, global_step, run)
    return f"{received} at {place}. {where}"


def set_aside(batch: Batch, keeps: bool, global_step: int, run: Run) -> str:
    """Write the batch of some ranks, and say where. Collective.

    Args:
        batch: This rank's.
        keeps: Whether this rank is one of them.
        global_step: Of the step, counted from 1.
        run: What trains.
    """
    answer = ""
    if keeps:
        name = f"step-{global_step:08d}-rank-{run.collectives.world.rank}.parquet"
        path = run.config.bad_batches_directory / name
        try:
            write_batch(batch, path, run.inputs.manifest.tasks)
            answer = str(path)
        except OSError as error:
            # the loss itself matters more than the batch
            answer = f"no file, for {path} cannot be written: {error}"
    answers = run.collectives.gather_objects(answer, "train.set_aside")
    return f"The batch is in {', '.join(one for one in answers if one)}"


def write_batch(batch: Batch, path: Path, tasks: Sequence[str] = ()) -> None:
    """One row an example, with the columns of train; `path` appears whole or not at all.

    Args:
        batch: With the labels of the further tasks of its dataset.
        path: Of the Parquet file.
        tasks: Their names.
    """
    arrays: dict[str, pa.Array] = {
        c.USER_INDEX: _array(batch.user_index),
        c.ITEM_INDEX: _array(batch.item_index),
        c.TIME: _array(batch.time),
        c.LABEL: _array(batch.labels[:, 0]),
        **dict(zip(map(c.task_column, tasks), map(_array, batch.labels.T[1:]), strict=True)),
        c.WEIGHT: _array(batch.weights),
        c.NUM_EVENTS: _array(batch.num_events),
    }
    lists: Mapping[str, Jagged] = {
        c.HISTORY: batch.history,
        c.HISTORY_TIMES: batch.history_times,
        **({} if batch.history_types is None else {c.HISTORY_TYPES: batch.history_types}),
        **batch.ids,
    }
    for name, bags in lists.items():
        arrays[name] = pa.LargeListArray.from_arrays(_array(bags.offsets), _array(bags.values))
    width = batch.dense.shape[1]
    if width:
        flat = _array(batch.dense.reshape(-1))
        arrays["dense"] = pa.FixedSizeListArray.from_arrays(flat, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    try:
        pq.write_table(pa.table(arrays), partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _array(tensor: Tensor) -> pa.Array:
    return pa.array(tensor.detach().cpu().contiguous().numpy())
