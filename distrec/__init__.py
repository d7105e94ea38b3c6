"""distrec: trains one unified recommender on many machines and scores everyone in batch."""

__version__ = "0.1.0"
