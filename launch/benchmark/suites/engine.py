"""Many minds at once: `sleepnet.Engine`, whose rows sleep when each must, beside an ideal batch of
as many rows whose boundaries all line up, float32.

The ideal batch draws L tokens in every row and sleeps once, whole, and so on; nobody comes or goes.
The engine's sessions begin at random places of their windows, so that in the steady state as many
reach a boundary in one step as in another. They take turns, of a window's length each. "Of ideal"
is the engine's tokens per second over the ideal batch's, sleeps and host included, of all turns
together. A step's latency is what every session waits for its next token: its median, its 99th
percentile, and that of the steps in which a group sleeps. On CPU it is at home on one core: NPROC=1
and the GLIBC_TUNABLES that `make benchmark` sets.
"""

import time

import jax
import numpy as np

import sleepnet
from launch.benchmark.suites import Options
from sleepnet.config import ModelConfig
from sleepnet.inference.sampling import Sampling, stack
from sleepnet.inference.slots import Slots

TAKES = ("repeats",)
MODEL = ModelConfig(vocab_size=256, pattern="AGAG", d_model=256, window=64, num_heads=4, passes=4)
SLOTS = (16, 64)
SAMPLING = Sampling(temperature=1.0)


def run(options: Options) -> dict:
    return {"rows": [_row(slots, options.repeats) for slots in SLOTS]}


def _row(slots: int, rounds: int) -> dict:
    params = sleepnet.init_params(MODEL, jax.random.key(0))
    ideal, engine = _Ideal(params, slots), _Unaligned(params, slots)
    aligned = []
    for _ in range(rounds):
        began = time.perf_counter()
        ideal.cycle()
        aligned.append(time.perf_counter() - began)
        engine.cycle()
    steps = np.array(engine.seconds)
    asleep = steps[np.array(engine.while_others_sleep)]
    tokens = slots * MODEL.window * rounds
    rates = tokens / sum(aligned), engine.drawn / steps.sum()
    p50, p99 = np.quantile(steps, (0.5, 0.99))
    return {
        "model": f"{MODEL.pattern} d={MODEL.d_model} L={MODEL.window}", "N": MODEL.passes,
        "slots": slots, "tokens/s, ideal": rates[0], "tokens/s, engine": rates[1],
        "of ideal": rates[1] / rates[0], "p50 ms": 1e3 * p50, "p99 / p50": p99 / p50,
        "p99 / p50, others asleep": np.quantile(asleep, 0.99) / p50,
        "steps with sleep, of all": len(asleep) / len(steps),
    }  # fmt: skip


class _Ideal:
    """All rows at the same place of their windows."""

    def __init__(self, params, slots):
        self._params, self._slots = params, Slots(params, config=MODEL, count=slots)
        self._rows, self._samplers = range(slots), stack([SAMPLING] * slots)
        self._tokens_B, self._drawn = np.zeros(slots, np.int32), 0
        self.cycle()

    def cycle(self):
        everybody = np.ones(len(self._rows), bool)
        for _ in range(MODEL.window):
            draw_B = np.full(len(self._rows), self._drawn, np.uint32)
            drawn_B, _ = self._slots.read_one(self._tokens_B, everybody, draw_B, self._samplers)
            self._tokens_B, self._drawn = np.asarray(drawn_B), self._drawn + 1
        state = self._slots.take(self._rows, len(self._rows))
        state = sleepnet.sleep(self._params, state, config=MODEL)
        self._slots.put(self._rows, jax.block_until_ready(state))


class _Unaligned:
    """Sessions that draw for ever, of which each began somewhere else in its window."""

    def __init__(self, params, slots):
        self._engine = sleepnet.Engine(params, config=MODEL, slots=slots)
        rng = np.random.default_rng(0)
        for row in range(slots):
            tokens = rng.integers(MODEL.vocab_size, size=rng.integers(1, MODEL.window + 1))
            self._engine.submit(
                tokens, max_new_tokens=1 << 20, sampling=Sampling(temperature=1.0, seed=row)
            )
        self.seconds, self.while_others_sleep, self.drawn = [], [], 0
        for _ in range(2):  # to the steady state
            self.cycle()
        self.seconds, self.while_others_sleep, self.drawn = [], [], 0

    def cycle(self):
        for _ in range(MODEL.window):
            self.while_others_sleep.append(self._engine.load.asleep > 0)
            began = time.perf_counter()
            self.drawn += len(self._engine.step())
            self.seconds.append(time.perf_counter() - began)
