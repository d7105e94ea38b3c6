"""Raw events and catalogues to a dataset of distrec.dataset, with Spark's own functions only."""

from distrec.prepare.run import CONFIG_SECTIONS, run

__all__ = ["CONFIG_SECTIONS", "run"]
