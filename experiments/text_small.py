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
