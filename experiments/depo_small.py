"""Depo on a laptop: who learns to follow a cycle of 8 nodes for 4 hops?

The 8 edges of a directed cycle, shuffled, fill two windows of 8 tokens; then come 8
questions "from here, k hops?" in two further windows. Only fast weights cross from a window
to the next. Test cycles are never seen in training.

    python -m launch.train --config=experiments/depo_small.py --workdir=runs/depo_small/n4 \
        --config.model.passes=4
    python -m launch.evaluate --workdir=runs/depo_small/n4

Cost: 4.1M tokens; on one CPU core (NPROC=1, GLIBC_TUNABLES=glibc.malloc.hugetlb=1) 6 minutes at
N = 4, 3 at N = 1. Expect at 4 hops, over three seeds: N = 4 .985, N = 2 .69, N = 1 .38, where
guessing scores .143 (results/depo_small).
"""

from experiments.defaults import experiment


def get_config():
    return experiment(
        task=dict(name="depo", nodes=8, symbols=8, hops=4, queries=8, window=8, curriculum=48000),
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
            steps=2000,
            checkpoint_every=500,  # 15 to 45 seconds; a save costs as much as two to six steps
            batch_size=64,
            muon_learning_rate=0.01,
            muon_weight_decay=0.01,
            adam_learning_rate=0.003,
            adam_b2=0.98,
            warmup_steps=50,
            decay_fraction=0.4,
        ),
        evaluation=dict(examples=1024, passes=(1, 2, 3, 4, 6)),
    )
