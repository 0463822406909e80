"""Rule 110 on a laptop: bits of a 12-cell ring after 1 to 4 steps.

Two unrelated 12-bit states fill a window each; then 12 questions "which bit, after t steps?"
in two further windows. Only fast weights cross from a window to the next. Test states are
never seen in training.

    python -m launch.train --config=experiments/rule110_small.py --workdir=runs/rule110_small/n4 \
        --config.model.passes=4
    python -m launch.evaluate --workdir=runs/rule110_small/n4

Cost: 3.7M tokens; on one CPU core (NPROC=1, GLIBC_TUNABLES=glibc.malloc.hugetlb=1) 6 minutes at
N = 4, 3 at N = 1. Expect after 4 steps, over three seeds: N = 4 .87, N = 1 .62, where guessing
scores .535 (results/rule110_small).
"""

from experiments.defaults import experiment


def get_config():
    return experiment(
        task=dict(
            name="rule110",
            cells=12,
            strings=2,
            steps=(1, 2, 3, 4),
            cells_asked=12,
            questions=12,
            window=12,
            curriculum=38400,
        ),
        model=dict(
            pattern="AG",
            d_model=64,
            num_heads=2,
            passes=4,
            rope_base=100.0,
            learned_positions=True,
            init_embedding_std=0.2,
            init_timestep=(0.018, 0.018),
            unroll=True,
        ),
        training=dict(
            steps=1200,
            batch_size=64,
            muon_learning_rate=0.01,
            muon_weight_decay=0.01,
            adam_learning_rate=0.003,
            adam_b2=0.98,
            warmup_steps=50,
            decay_fraction=0.4,
        ),
        evaluation=dict(examples=1024, passes=(1, 2, 4)),
    )
