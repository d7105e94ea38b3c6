"""Training: the loop, its schedule and early stopping, what it logs, and one rank's process."""

from distrec.trainer.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
