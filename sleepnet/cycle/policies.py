"""Policies for the number of passes, and a sleep that asks one of them between passes."""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable
from typing import ClassVar

import jax

from sleepnet.config import ConfigError, ModelConfig
from sleepnet.cycle import cache
from sleepnet.cycle.sleep import end_passes, one_pass, sleep, sleep_inputs
from sleepnet.integers import as_integer
from sleepnet.types import WakeState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """Cost of a sleep so far, or in total.

    passes: N; the wake pass is the first.
    seconds: by the clock on the wall, and with compiling where a program is new.
    change: how far the last pass moved the core's fast weights, relative to their norm, in the row
      where that is most; None where no pass was looked at.
    """

    passes: int = 1
    seconds: float = 0.0
    change: float | None = None


@dataclasses.dataclass(frozen=True)
class FixedPasses:
    """N passes: `sleep(passes=N)`, bit for bit."""

    name: ClassVar[str] = "fixed"
    passes: int

    def __post_init__(self):
        _check_count(self, "passes")

    def goes_on(self, spent: Spent) -> bool:
        """Whether to run one more pass."""
        return spent.passes < self.passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class UntilStill:
    """Passes as long as the last moved the fast weights by at least `change`, at most `at_most`."""

    name: ClassVar[str] = "until_still"
    change: float = 0.01  # relative to their norm
    at_most: int = 16

    def __post_init__(self):
        _check_above_zero(self, "change")
        _check_count(self, "at_most")

    def goes_on(self, spent: Spent) -> bool:
        """Whether to run one more pass."""
        moved = spent.change is None or spent.change >= self.change
        return moved and spent.passes < self.at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithinSeconds:
    """Passes for which the time is enough, by the mean of those before; at most `at_most`.

    One pass is always run, for its time is not known; the coda and the commit are not counted.
    """

    name: ClassVar[str] = "within_seconds"
    seconds: float
    at_most: int = 64

    def __post_init__(self):
        _check_above_zero(self, "seconds")
        _check_count(self, "at_most")

    def goes_on(self, spent: Spent) -> bool:
        """Whether to run one more pass."""
        next_one = spent.seconds / max(spent.passes - 1, 1)
        return spent.seconds + next_one <= self.seconds and spent.passes < self.at_most


Policy = FixedPasses | UntilStill | WithinSeconds
POLICIES = {policy.name: policy for policy in (FixedPasses, UntilStill, WithinSeconds)}


def policy_of(passes: int | Policy) -> Policy:
    """Convert a number of passes N to FixedPasses(N).

    Raises:
      ConfigError: neither a number of 1 or more nor a policy.
    """
    return passes if isinstance(passes, Policy) else FixedPasses(passes)


def sleep_by(
    policy: Policy,
    params,
    state: WakeState,
    *,
    config: ModelConfig,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[WakeState, Spent]:
    """Run `sleep` for all rows, with as many passes as the policy wants.

    Waits for the device: after each pass if the policy asks what it did, and at the end.

    Args:
      clock: seconds.

    Returns:
      What `sleep` returns, and what was spent.
    """
    cache.check_state(config, state)
    began = clock()
    if isinstance(policy, FixedPasses):
        spent = Spent(passes=policy.passes)
        state = sleep(params, state, config=config, passes=policy.passes)
    else:
        state, spent = _pass_by_pass(policy, params, state, config, lambda: clock() - began)
    jax.block_until_ready(state)
    return state, dataclasses.replace(spent, seconds=clock() - began)


def _pass_by_pass(policy, params, state, config, elapsed):
    inputs, spent = sleep_inputs(state), Spent()
    refined = (state.window.features_BLD, {"core": inputs.working["core"]})
    while policy.goes_on(spent):
        refined, change_B = one_pass(params, inputs, refined, config=config)
        change = float(change_B.max())
        spent = Spent(passes=spent.passes + 1, seconds=elapsed(), change=change)
    if spent.passes == 1:
        return sleep(params, state, config=config, passes=1), spent
    return end_passes(params, state, refined, config=config), spent


def _check_count(policy, name: str):
    count = as_integer(name, getattr(policy, name), 1, error=ConfigError)
    object.__setattr__(policy, name, count)


def _check_above_zero(policy, name: str):
    value = getattr(policy, name)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:
        raise ConfigError(f"{name} must be a number above 0; got {value!r}")
    object.__setattr__(policy, name, float(value))
