"""Raw events and catalogues to a dataset of distrec.dataset, with Spark's own functions only."""

from distrec.prepare.output import CONFIG_SECTIONS
from distrec.prepare.run import run

__all__ = ["CONFIG_SECTIONS", "run"]
