"""An engine under random sessions for as long as you like: nothing leaks, sticks or is lost.

    python tests/soak_engine.py --minutes=60 [--out=soak.json]

Sessions of random lengths are submitted, most are left to end, some are cancelled at random
moments, some are kept and go on as new ones, some fail (their minds are made of NaN), and now and
then more come than may wait. Watched: every session ends, for the right reason and with as many
tokens as it asked for; none takes longer than the work before it explains; memory and the number of
live arrays stay what they were after the first minute; and one session in a hundred is run again,
beside whoever is there then, and must draw the same tokens.
"""

import argparse
import collections
import gc
import json
import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import sleepnet
from sleepnet.inference.engine import CANCELLED, FAILED, LENGTH, Drawn, EngineFull, Limits
from sleepnet.inference.sampling import Sampling
from sleepnet.inference.snapshot import Snapshot

CONFIG = sleepnet.ModelConfig(
    vocab_size=16, pattern="AG", d_model=16, num_heads=2, window=8, passes=3
)
SLOTS, WAITING = 16, 24
STEPS_AT_MOST = 20_000  # of one session, from its submission to its end
GROWTH = 1.05  # of memory, from the first minute to the last


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for what was found")
    options = parser.parse_args()
    soak = Soak(options.seed)
    found = soak.run(60 * options.minutes)
    print(json.dumps(found))
    if options.out:
        options.out.write_text(json.dumps(found) + "\n")
    return 1 if found["wrong"] else 0


class Soak:
    """Sessions come and go in one engine."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params = sleepnet.init_params(CONFIG, jax.random.key(0))
        self.engine = sleepnet.Engine(
            self.params, config=CONFIG, slots=SLOTS, limits=Limits(waiting=WAITING)
        )
        self.plans, self.drawn, self.kept = {}, collections.defaultdict(list), []
        self.reasons, self.wrong = collections.Counter(), []
        self.steps = self.sent_back = self.repeated = 0
        self.to_repeat = []
        newborn = sleepnet.init_state(CONFIG, 1)
        self.sick = jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, newborn
        )
        self.sick = Snapshot(state=self.sick, policy=sleepnet.FixedPasses(3), sampling=Sampling())

    def run(self, seconds):
        began, memory = time.monotonic(), []
        next_look = 60.0
        while (now := time.monotonic() - began) < seconds:
            self.turn()
            while self.to_repeat:
                self.run_again(*self.to_repeat.pop())
            if now > next_look:
                memory.append(_memory())
                next_look += 60
                print(f"{now:.0f} s: {self.steps} steps, {dict(self.reasons)}, {memory[-1]}")
        for event in self.engine.run():
            self.heard(event)
        if self.plans:
            self.wrong.append(f"sessions {list(self.plans)} never ended")
        if len(memory) > 1 and memory[-1]["MiB"] > GROWTH * memory[0]["MiB"]:
            self.wrong.append(f"memory grew: {memory}")
        if len(memory) > 1 and memory[-1]["arrays"] > memory[0]["arrays"] + 2 * 60 * SLOTS:
            self.wrong.append(f"arrays grew: {memory}")
        return {
            "seconds": round(time.monotonic() - began), "steps": self.steps,
            "sessions": sum(self.reasons.values()), "ended": dict(self.reasons),
            "sent back": self.sent_back, "run again alone": self.repeated,
            "memory": memory[:: max(1, len(memory) // 8)], "wrong": self.wrong,
        }  # fmt: skip

    def turn(self):
        """Perhaps somebody comes, perhaps somebody is cancelled; a step."""
        while self.rng.random() < 0.35:
            self.submit()
        if self.plans and self.rng.random() < 0.03:
            key = int(self.rng.choice(list(self.plans)))
            self.engine.cancel(key)
            self.plans[key]["cancelled"] = True
        for event in self.engine.step():
            self.heard(event)
        self.steps += 1
        late = [k for k, plan in self.plans.items() if self.steps - plan["step"] > STEPS_AT_MOST]
        if late:
            raise SystemExit(f"sessions {late} are stuck: {self.engine.load}")

    def submit(self):
        rng = self.rng
        tokens = rng.integers(0, CONFIG.vocab_size, rng.geometric(0.04))
        snapshot = self.kept.pop() if self.kept and rng.random() < 0.5 else None
        sick = snapshot is None and rng.random() < 0.02
        options = {
            "max_new_tokens": int(rng.geometric(0.05)) - 1, "keep": bool(rng.random() < 0.1),
            "sampling": Sampling(temperature=float(rng.choice([0, 1])), seed=int(rng.integers(99))),
            "snapshot": self.sick if sick else snapshot,
        }  # fmt: skip
        try:
            key = self.engine.submit(tokens, **options)
        except EngineFull:
            self.sent_back += 1
            return
        self.plans[key] = {
            "tokens": tokens, "options": options, "sick": sick, "cancelled": False,
            "step": self.steps,
        }  # fmt: skip

    def heard(self, event):
        if isinstance(event, Drawn):
            self.drawn[event.key].append(event.token)
            return
        plan, drawn = self.plans.pop(event.key), self.drawn.pop(event.key, [])
        self.reasons[event.reason] += 1
        allowed = {FAILED} if plan["sick"] else {LENGTH}
        if event.reason not in allowed | ({CANCELLED} if plan["cancelled"] else set()):
            self.wrong.append(f"session {event.key} ended as {event.reason}: {event.error}")
        asked = plan["options"]["max_new_tokens"]
        if event.reason == LENGTH and len(drawn) != asked:
            self.wrong.append(f"session {event.key} drew {len(drawn)} of {asked}")
        if event.snapshot is not None and len(self.kept) < 50:
            self.kept.append(event.snapshot)
        if event.reason == LENGTH and self.rng.random() < 0.01:
            self.to_repeat.append((plan, drawn))

    def run_again(self, plan, drawn):
        """Beside whoever is there now, which must not matter."""
        try:
            again = self.engine.submit(plan["tokens"], **plan["options"])
        except EngineFull:
            return
        self.repeated += 1
        self.plans[again] = plan | {"step": self.steps, "cancelled": False}
        tokens = []
        while again in self.plans:
            for event in self.engine.step():
                if event.key != again:
                    self.heard(event)
                elif isinstance(event, Drawn):
                    tokens.append(event.token)
                else:
                    del self.plans[again]
        if tokens != drawn:
            self.wrong.append(f"drew {drawn}, and then {tokens}")


def _memory():
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    mib = pages * resource.getpagesize() / 2**20
    return {"MiB": round(mib), "arrays": len(jax.live_arrays())}


if __name__ == "__main__":
    sys.exit(main())
