"""Rule 110 at the paper's size: four 24-bit states, the first bit of each after 32 steps.

Lee et al. 2026: 4 layers, d = 256, window 24, batch 512, about 5 billion tokens, less than one
day on an A6000; after them exact accuracy at t = 32 was about 10% for N = 1 (the floor, 9.95%),
20% for N = 2, and above 30% for N = 3 and 4. We have not run it to the end: it needs an
accelerator. What is tested here is that it builds, compiles and takes steps.

    python -m launch.train --config=experiments/rule110.py --workdir=runs/rule110/t32n4 \
        --config.model.passes=4 --config.task.steps="(32,)"

The labels stand in a fifth window, on a question token each, so that the fourth context window
sleeps too. 120 tokens a sequence with that window full: 5e9 / (512 * 120) = 81,380 steps.
"""

from experiments.defaults import experiment


def get_config():
    return experiment(
        task=dict(name="rule110", cells=24, strings=4, steps=(32,), cells_asked=1, questions=4,
                  window=24),
        model=dict(pattern="AGAG", d_model=256, num_heads=4, passes=4, remat="window"),
        training=dict(
            steps=81_380,
            batch_size=512,
            muon_learning_rate=2e-3,
            adam_learning_rate=5e-5,
            warmup_steps=1000,
            log_every=100,
            checkpoint_every=1000,
        ),
        evaluation=dict(examples=8192, batch_size=512, passes=(1, 2, 3, 4)),
    )  # fmt: skip
