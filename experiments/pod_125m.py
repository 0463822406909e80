"""A hybrid of 127 million parameters that sleeps every 2048 tokens: 8 chips of TPU v5e.

12 blocks of width 768, embeddings tied; 32 examples of 8192 tokens a step, 262,144 tokens, in two
parts. Parameters are whole on every chip.

    python -m launch.compile --config=experiments/pod_125m.py --topology=v5e:2x4
    python -m launch.train --config=experiments/pod_125m.py --workdir=gs://BUCKET/pod_125m \
        [--config.model.passes=1]

Cost: unknown, 5.2 billion tokens; the least time of a step stands in results/PODS.md. Compiled for
v5e:2x4, never ran on it.
"""

from experiments.pod import pod


def get_config():
    return pod(layers=12, d_model=768, batch_size=32, parts=2, fsdp=1, tie_embeddings=True)
