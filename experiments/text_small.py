"""Text on a laptop: the docstrings of Python's standard library, byte by byte.

A document is the docstrings of one module; one module in ten is held out. Rows of four windows of
64 bytes; only fast weights cross from a window to the next. Longer documents are cut into pieces of
256 bytes that each begin newborn.

    python -m experiments.stdlib_corpus runs/stdlib
    python -m launch.train --config=experiments/text_small.py --workdir=runs/text_small/n4 \
        --config.model.passes=4
    python -m launch.evaluate --workdir=runs/text_small/n4

RESULT
"""

from experiments.defaults import experiment


def get_config():
    return experiment(
        task=dict(
            name="text",
            train_files=("runs/stdlib/train.jsonl",),
            test_files=("runs/stdlib/test.jsonl",),
            window=64,
            windows=4,
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
            unroll=False,
        ),
        training=dict(
            steps=600,
            batch_size=16,
            muon_learning_rate=0.01,
            muon_weight_decay=0.01,
            adam_learning_rate=0.003,
            adam_b2=0.98,
            warmup_steps=50,
            decay_fraction=0.4,
        ),
        evaluation=dict(examples=256, batch_size=32, passes=(1, 2, 4)),
    )
