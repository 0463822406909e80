"""A hybrid of 1.4 billion parameters that sleeps every 2048 tokens: 16 chips of v5e, or 8 of v5p.

24 blocks of width 2048, embeddings tied; 64 examples of 8192 tokens a step, 524,288 tokens, in four
parts. Parameters are split over all chips.

    python -m launch.compile --config=experiments/pod_1b.py --topology=v5e:4x4
    python -m launch.compile --config=experiments/pod_1b.py --topology=v5p:2x2x2 \
        --config.mesh.fsdp=8
    python -m launch.train --config=experiments/pod_1b.py --workdir=gs://BUCKET/pod_1b \
        [--config.model.passes=1]

Cost: unknown, 10.5 billion tokens; the least time of a step stands in results/PODS.md. Compiled for
v5e:4x4 and v5p:2x2x2, never ran on them.
"""

from experiments.pod import pod


def get_config():
    return pod(layers=24, d_model=2048, batch_size=64, parts=4, fsdp=16, tie_embeddings=True)
