"""Text on a laptop: the docstrings of Python's standard library, byte by byte.

A document is the docstrings of one module; one module in ten is held out. Rows of four windows of
64 bytes; only fast weights cross from a window to the next. Longer documents are cut into pieces of
256 bytes that each begin from a fresh state.

    python -m experiments.stdlib_corpus runs/stdlib
    python -m launch.train --config=experiments/text_small.py --workdir=runs/text_small/n4 \
        --config.model.passes=4
    python -m launch.evaluate --workdir=runs/text_small/n4

Cost: 1.0M bytes read, two thirds of an epoch; on one CPU core (NPROC=1,
GLIBC_TUNABLES=glibc.malloc.hugetlb=1) 2 minutes of its time at N = 4, 1 at N = 1, compilation
included. Rows are 99.4% full. Expect on 256 held-out rows, one seed, Python 3.11.7: at N = 1 1.890
nats per byte [1.846, 1.935], 2.727 bits; at N = 4 1.895 [1.851, 1.939], 2.734 bits. So short a
training shows no use of sleep on this text: the fourth window of a document is no easier than the
first (1.90 and 1.87 nats at N = 1, 1.92 and 1.87 at N = 4). It shows that text goes through.
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
            steps=240,
            batch_size=16,
            muon_learning_rate=0.01,
            muon_weight_decay=0.01,
            adam_learning_rate=0.003,
            adam_b2=0.98,
            warmup_steps=20,
            decay_fraction=0.4,
        ),
        evaluation=dict(examples=256, batch_size=32, passes=(1, 2, 4)),
    )
