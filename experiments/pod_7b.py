"""A hybrid of 7 billion parameters that sleeps every 2048 tokens: 64 chips of v5p, or 256 of v5e.

32 blocks of width 4096; 256 examples of 8192 tokens a step, 2 million tokens: on v5p in two parts.
Parameters are split over all chips.

    python -m launch.compile --config=experiments/pod_7b.py --topology=v5p:4x4x4
    python -m launch.compile --config=experiments/pod_7b.py --topology=v5e:16x16 \
        --config.mesh.fsdp=256 --config.training.parts=1
    python -m launch.train --config=experiments/pod_7b.py --workdir=gs://BUCKET/pod_7b \
        [--config.model.passes=1]

Cost: unknown, 42 billion tokens; the least time of a step stands in results/PODS.md. Compiled for
v5p:4x4x4 and v5e:16x16, never ran on them.
"""

from experiments.pod import pod


def get_config():
    return pod(layers=32, d_model=4096, batch_size=256, parts=2, fsdp=64)
