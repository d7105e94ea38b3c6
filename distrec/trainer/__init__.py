"""Training: the loop, its schedule and early stopping, what it logs, and one rank's process."""

from distrec.trainer.loop import train
from distrec.trainer.result import TrainResult

__all__ = ["TrainResult", "train"]
