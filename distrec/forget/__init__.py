"""Taking people out of everything that a run has kept, in place of training it again."""

from distrec.forget.steps import run

__all__ = ["run"]
