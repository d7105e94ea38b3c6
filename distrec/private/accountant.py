"""What training spends: epsilon of Poisson-sampled Gaussian steps, by Opacus' accountant.

Of its accountants this takes RDP: PRV gives an epsilon that is some 5 % lower, but finding the
noise with it takes up to minutes.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import lru_cache

from distrec import pulse
from distrec.config import PrivacyConfig
from distrec.errors import ConfigError

_MOST_NOISE = 1e6
_CLOSE = 0.995


@dataclass(frozen=True)
class Spending:
    """Steps that are all of one kind.

    Args:
        noise_multiplier: Standard deviation of the noise over the clip norm.
        sample_rate: Chance of a user to be in a step.
        delta: At which epsilon is told.
    """

    noise_multiplier: float
    sample_rate: float
    delta: float

    def epsilon(self, num_steps: int) -> float:
        """After so many steps."""
        return _epsilon(self, num_steps) if num_steps else 0.0


# some tenths of a second, and asked for more than once at a checkpoint
@lru_cache(maxsize=64)
def _epsilon(spending: Spending, num_steps: int) -> float:
    from opacus.accountants import RDPAccountant  # seconds

    accountant = RDPAccountant()
    accountant.history = [(spending.noise_multiplier, spending.sample_rate, num_steps)]
    with warnings.catch_warnings():
        # that more orders might give a lower epsilon; this one holds as well
        warnings.filterwarnings("ignore", message="Optimal order is the", module="opacus")
        return float(accountant.get_epsilon(delta=spending.delta))


def check_opacus() -> None:
    """Refuse a run that has nobody to count for it.

    Raises:
        ConfigError: Opacus is not installed.
    """
    if importlib.util.find_spec("opacus") is None:
        raise ConfigError(
            "[privacy] needs the package opacus. Received: an environment without. Install it on "
            "every host: pip install -c constraints.txt 'distrec[privacy]'"
        )


def find_noise_multiplier(config: PrivacyConfig, num_steps: int) -> float:
    """The smallest noise, to within half a percent of epsilon, that spends at most the target.

    Opacus has a search of its own, which is as long but says nothing to a watchdog meanwhile.

    Raises:
        ConfigError: No noise is enough.
    """
    target = config.target_epsilon

    def epsilon(noise_multiplier: float) -> float:
        pulse.beat()
        return Spending(noise_multiplier, config.sample_rate, config.delta).epsilon(num_steps)

    low, high = 0.0, 4.0
    while (spent := epsilon(high)) > target:
        if high >= _MOST_NOISE:
            raise ConfigError(
                "some noise keeps a run within privacy.target_epsilon. Received: target_epsilon = "
                f"{target} for {num_steps} steps at sample_rate = {config.sample_rate}, delta = "
                f"{config.delta}, of which {spent:.3g} is spent with any noise. Raise either."
            )
        low, high = high, 2.0 * high
    while spent < _CLOSE * target and high - low > 1e-3:
        middle = (low + high) / 2.0
        if (found := epsilon(middle)) <= target:
            high, spent = middle, found
        else:
            low = middle
    return high


def affordable_steps(spending: Spending, target_epsilon: float, most: int) -> int:
    """How many of `most` steps spend at most the target.

    Raises:
        ConfigError: Not even one.
    """
    if spending.epsilon(most) <= target_epsilon:
        return most
    low, high = 0, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        if spending.epsilon(middle) <= target_epsilon:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise ConfigError(
            "privacy.target_epsilon allows a step. Received: target_epsilon = "
            f"{target_epsilon}, noise_multiplier = {spending.noise_multiplier}, of which one step "
            f"spends {spending.epsilon(1):.3g}. Raise either, or leave noise_multiplier out."
        )
    return low
