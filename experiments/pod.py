"""What the pod experiments share: sleeping hybrids that read 8k tokens in windows of 2k.

They differ in size. Every window of 2048 tokens is followed by a sleep; gradients go through all
windows and passes, and what they need of the forward pass is computed again.
"""

from experiments.defaults import experiment

# Of the task only shapes are compiled. This one stands for text: three windows of context and one
# of questions, so that one position in eight is scored.
TASK = dict(name="depo", nodes=3072, symbols=3072, hops=8, queries=1024, window=2048)


def pod(*, layers: int, d_model: int, batch_size: int, parts: int, fsdp: int, **model):
    """The config of a hybrid with heads of 128 and one G block for each A block."""
    return experiment(
        task=TASK,
        model=dict(
            vocab_size=50_304,
            pattern="AG" * (layers // 2),
            d_model=d_model,
            num_heads=d_model // 128,
            passes=4,
            compute_dtype="bfloat16",
            remat="window+pass+block",
            **model,
        ),
        training=dict(
            steps=20_000,
            batch_size=batch_size,
            parts=parts,
            warmup_steps=500,
            decay_fraction=0.2,
            checkpoint_every=500,
        ),
        mesh=dict(fsdp=fsdp),
    )
