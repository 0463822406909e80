"""Depo at the paper's size: cycles of up to 75 nodes over four windows, up to 16 hops.

Lee et al. 2026: 10 layers, d = 512, window 75, batch 128, 100,000 steps, one to two H100-days;
loss curves only: N = 1 stalls at 4 hops and more, N = 2 at 8, and only N = 4 begins to move at
16. We have not run it to the end: it needs an accelerator. What is tested here is that it
builds, compiles and takes steps.

    python -m launch.train --config=experiments/depo.py --workdir=runs/depo/n4 \
        --config.model.passes=4

On a CPU, to see it run: --config.training.steps=3 --config.training.warmup_steps=1
--config.training.batch_size=2
"""

from experiments.defaults import experiment


def get_config():
    return experiment(
        task=dict(
            name="depo",
            nodes=75,
            min_nodes=3,
            hops=16,
            test_hops=(1, 2, 4, 8, 16),
            symbols=50,
            min_word=1,
            max_word=2,
            queries=10,
            window=75,
        ),
        model=dict(pattern="AGAGAGAGAG", d_model=512, num_heads=8, passes=4, remat="window+pass"),
        training=dict(
            steps=100_000,
            batch_size=128,
            muon_learning_rate=2e-3,
            adam_learning_rate=5e-5,
            warmup_steps=1000,
            log_every=100,
            checkpoint_every=1000,
        ),
        evaluation=dict(examples=2048, batch_size=128, passes=(1, 2, 4)),
    )
