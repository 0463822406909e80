"""Training steps without sleep (N = 1) and with it (N = 4).

d = 64 "AG", 16-token windows, one of context and one of questions, batch 64, float32. On CPU it
is at home on one core: NPROC=1 and GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make benchmark` sets.
"""

import jax

from launch.benchmark.suites import Options
from sleepnet import tasks
from sleepnet.config import ModelConfig, TrainingConfig
from sleepnet.evaluation.latency import interleaved
from sleepnet.tasks import DepoConfig
from sleepnet.training.step import init_train_state, make_train_step

TAKES = ("repeats",)
PASSES = (1, 4)


def run(options: Options) -> dict:
    task = tasks.make(DepoConfig(nodes=8, symbols=8, hops=4, queries=8, window=16))
    batch = next(tasks.batches(task, "train", 64, num_batches=1))
    timings = interleaved({N: _call(task, N, batch) for N in PASSES}, options.repeats)
    tokens = batch.tokens_WL.size
    rows = [
        {"N": N, "step ms": timing.median_ms, "tokens/s": 1e3 * tokens / timing.median_ms}
        for N, timing in timings.items()
    ]
    return {"rows": rows}


def _call(task, passes, batch):
    model = ModelConfig(
        vocab_size=task.vocab_size, pattern="AG", d_model=64, num_heads=2, window=task.window,
        passes=passes, learned_positions=True, unroll=True,
    )  # fmt: skip
    training = TrainingConfig(batch_size=64)
    step = make_train_step(model, training, task.window_passes(passes), task.scored_per_window)
    state = jax.jit(lambda: init_train_state(model, training))()

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return call
