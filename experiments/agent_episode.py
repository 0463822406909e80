"""An agent's day: a thousand steps of observe and act, at one price each.

    python -m experiments.agent_episode [--workdir=runs/text_small/n4] [--steps=1000] [--attention]

The mind of a `sleepnet.Session` reads each observation and writes its action, byte by byte, and
sleeps whenever its window is full. Printed is how long the steps took, hundred by hundred, and how
the last hundred compares with the first. With --attention the same loop runs again over as many
blocks of attention that keep every byte of the day; their cache doubles when it is full, which is
not timed.

Without --workdir the parameters are random, and what it does is noise: what is measured is the time
of a step, which does not depend on them.

Cost: a minute on one CPU core (NPROC=1), four with --attention. Expect a ratio near 1, and with
attention one that grows with the day.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import sleepnet
from launch.common import cli
from sleepnet.evaluation.markdown import table
from sleepnet.training.workdir import load_config, load_params

_WORKDIR = cli.define_path("workdir", None, "Folder of a run that was trained on bytes.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Of the episode, 200 or more.", 200)
_ATTENTION = flags.DEFINE_bool("attention", False, "Run attention over the whole day, too.")

CONFIG = sleepnet.ModelConfig(
    vocab_size=256, pattern="AGAG", d_model=128, num_heads=2, window=256, passes=4
)
ACTION_TOKENS = 4
_WARM_UP = 30  # steps of another episode, in which everything is compiled
_HUNDRED = 100


class Step(NamedTuple):
    """What the environment answers to an action."""

    observation: str
    reward: float
    done: bool


class Building:
    """Doors and their codes. A note at the door tells all of them; each step asks for one."""

    def __init__(self, *, doors: int = 8, steps: int = 1000, seed: int = 0):
        self._steps, self._seed, self._doors = steps, seed, doors

    def reset(self) -> str:
        """A new day, the same for the same seed; its first observation."""
        self._rng = np.random.default_rng(self._seed)
        self._codes = self._rng.integers(10, size=self._doors).tolist()
        self._taken = 0
        told = "".join(f"door {door} code {code}. " for door, code in enumerate(self._codes))
        return told + self._ask()

    def step(self, action: str) -> Step:
        """Rewards 1 if the action begins with the code of the door that was asked for."""
        reward = float(action.startswith(str(self._codes[self._asked])))
        self._taken += 1
        return Step(self._ask(), reward, self._taken >= self._steps)

    def _ask(self) -> str:
        self._asked = int(self._rng.integers(self._doors))
        return f"\n[{self._taken:06d}] you stand before door {self._asked}. code? "


class Agent:
    """Observe and act, over one session.

    Args:
      session: reads and writes text.
      make_room: called before each step with the session and the bytes that the step takes at
        most; returns the session to go on with. By default the same: it sleeps when it must.
    """

    def __init__(
        self,
        session: sleepnet.Session,
        make_room: Callable[[sleepnet.Session, int], sleepnet.Session] = lambda session, _: session,
    ):
        self.session, self._make_room = session, make_room

    def act(self, observation: str) -> tuple[str, float]:
        """The action, and the milliseconds from observation to action."""
        self.session = self._make_room(self.session, len(observation.encode()) + ACTION_TOKENS)
        began = time.perf_counter()
        self.session.feed(observation)
        action = "".join(self.session.generate_text(ACTION_TOKENS))
        return action, 1e3 * (time.perf_counter() - began)


def live(agent: Agent, building: Building) -> Iterator[tuple[float, float, int]]:
    """Milliseconds, reward and bytes of life of each step of an episode."""
    observation, done = building.reset(), False
    while not done:
        action, ms = agent.act(observation)
        observation, reward, done = building.step(action)
        yield ms, reward, agent.session.position


def flatness(times_ms) -> float:
    """The median step of the last hundred over that of the first."""
    return float(np.median(times_ms[-_HUNDRED:]) / np.median(times_ms[:_HUNDRED]))


def doubling(params) -> Callable[[sleepnet.Session, int], sleepnet.Session]:
    """For `Agent`: a session that never sleeps, because its window doubles when it is full."""

    def make_room(session, more):
        config = session.config
        window = config.window
        while session.position + more > window:
            window *= 2
        if window == config.window:
            return session
        roomier = dataclasses.replace(config, window=window)
        again = sleepnet.Session(params, config=roomier, tokenizer="bytes")
        again.feed(np.array(session.tokens, np.int32))
        return again

    return make_room


def main(_):
    params, config = _mind()
    _report("sleeps", _day(lambda: Agent(_session(params, config))))
    if _ATTENTION.value:
        whole = dataclasses.replace(
            config, pattern="A" * config.num_blocks, passes=1, learned_positions=False
        )
        attentive = sleepnet.init_params(whole, jax.random.key(0))
        _report(
            "attention over the whole day",
            _day(lambda: Agent(_session(attentive, whole), doubling(attentive))),
        )


def _mind():
    """Parameters and their config: of a run, or random."""
    if _WORKDIR.value is None:
        return sleepnet.init_params(CONFIG, jax.random.key(0)), CONFIG
    return load_params(_WORKDIR.value, None)[0], load_config(_WORKDIR.value).model


def _session(params, config) -> sleepnet.Session:
    return sleepnet.Session(params, config=config, tokenizer="bytes")


def _day(make_agent: Callable[[], Agent]) -> list[tuple[float, float, int]]:
    for _ in live(make_agent(), Building(steps=_WARM_UP)):
        pass
    return list(live(make_agent(), Building(steps=_STEPS.value)))


def _report(name: str, day: list[tuple[float, float, int]]):
    rows = []
    for first in range(0, len(day), _HUNDRED):
        times_ms, rewards, lived = zip(*day[first : first + _HUNDRED], strict=True)
        p50, p99 = np.quantile(times_ms, (0.5, 0.99))
        cells = (f"{p50:.1f}", f"{p99:.1f}", f"{max(times_ms):.1f}", f"{lived[-1]:,}")
        rows.append([f"{first + 1}..{first + len(times_ms)}", *cells, f"{sum(rewards):.0f}"])
    print(f"\n{name}: {flatness([ms for ms, *_ in day]):.2f} times the first hundred at the last")
    print(table(["steps", "ms p50", "p99", "longest", "bytes of life", "doors opened"], rows))


if __name__ == "__main__":
    cli.run(main)
