"""Differentially private training: users are drawn and clipped, noise is added, epsilon counted."""

from distrec.private.accountant import (
    Spending,
    affordable_steps,
    check_opacus,
    find_noise_multiplier,
)
from distrec.private.noise import SecretNoise, draw_key
from distrec.private.objective import PrivateObjective
from distrec.private.users import UserReader

__all__ = [
    "PrivateObjective",
    "SecretNoise",
    "Spending",
    "UserReader",
    "affordable_steps",
    "check_opacus",
    "draw_key",
    "find_noise_multiplier",
]
