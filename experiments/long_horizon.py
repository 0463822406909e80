"""Who remembers how long: models of one size that read the same facts.

Four facts, "key value", stand on pages of 8 tokens among distractors, 1 to 4 pages before four
questions. The hybrids read a page at a time, and what crosses to the next is fast weights alone;
"sleeping" makes N = 4 passes over each page, "plain" the one of wake. "sliding" is attention over
the last 8 tokens, "full" attention that reads the whole stream as one window. From as many tokens
as the others "full" learns next to nothing; "full_longer" reads four times as many. Sets of facts
in the test are never seen in training.

    python -m launch.train --config=experiments/long_horizon.py --workdir=runs/long_horizon/sleeping
    python -m launch.train --config=experiments/long_horizon.py:plain \
        --workdir=runs/long_horizon/plain
    python -m launch.long_horizon --workdir=runs/long_horizon/sleeping \
        --workdir=runs/long_horizon/plain --out=runs/long_horizon/report

Cost: on one CPU core about 6 minutes ("sleeping"), 2 ("plain", "sliding", "full") or 8
("full_longer") a run; asking it takes 5 minutes more. Expect both hybrids to answer nearly all up
to 128 pages, 32 times as far as they learned, and to forget from 256 on, "sleeping" sooner than
"plain" (.94 and .99 at 256, .53 and .68 at 1,024): recall alone has no use for more passes. "full"
learned in no seed, "full_longer" in one of three, and that one fails beyond the distances of
training; "full" with other rates (Muon .01 and .03, Adam .003 to .03), four heads, or embeddings of
unit size at the start, one seed of each, did no better.
"""

from experiments.defaults import experiment

PAGE, DEPTHS = 8, (1, 2, 4)
_WHOLE = PAGE * (DEPTHS[-1] + 1)
# Of each model what differs from the others, in the model and in how its tokens are laid out.
MODELS = {
    "sleeping": (dict(pattern="AG", passes=4), {}),
    "plain": (dict(pattern="AG", passes=1), {}),
    "sliding": (dict(pattern="AA", passes=1, eviction="sliding"), {}),
    "full": (dict(pattern="AA", passes=1), dict(window=_WHOLE)),
    "full_longer": (dict(pattern="AA", passes=1), dict(window=_WHOLE)),
}
STEPS = 1500


def get_config(model: str = "sleeping"):
    of_model, of_task = MODELS[model]
    return experiment(
        task=dict(name="facts", facts=4, keys=16, values=16, noise=16, depths=DEPTHS, page=PAGE,
                  **(dict(window=PAGE) | of_task)),
        model=dict(
            d_model=64,
            num_heads=2,
            rope_base=100.0,
            init_embedding_std=0.2,
            init_timestep=(0.018, 0.018),
            unroll=False,
            **of_model,
        ),
        training=dict(
            steps=STEPS * (4 if model == "full_longer" else 1),
            batch_size=64,
            muon_learning_rate=0.01,
            muon_weight_decay=0.01,
            adam_learning_rate=0.01,
            adam_b2=0.98,
            warmup_steps=50,
            decay_fraction=0.4,
        ),
        evaluation=dict(examples=256, batch_size=64, passes=(1,)),
    )  # fmt: skip
