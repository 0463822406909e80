"""A training step over a mesh of devices is the step on one device, and each holds its share."""

import collections
import dataclasses
import functools
import itertools
import math
import re

import jax
import pytest
from agreement import GRADIENTS, assert_agree

from sleepnet import tasks
from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.evaluation.programs import Program
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import DepoConfig
from sleepnet.training import sharding
from sleepnet.training.optimizer import labels
from sleepnet.training.step import init_train_state, make_train_step

TASK = DepoConfig(nodes=6, symbols=6, hops=3, queries=3, window=6)
MODEL = ModelConfig(
    vocab_size=9, pattern="AG", d_model=16, num_heads=2, window=6, passes=2,
    learned_positions=True,
)  # fmt: skip
# Prelude, repeated core and coda, and what else a block can be.
LARGE = dataclasses.replace(
    MODEL, pattern="G[AGAG]A", passes=3, mlp="swiglu", tie_embeddings=True, eviction="sliding"
)
TRAINING = TrainingConfig(steps=3, batch_size=16, warmup_steps=1, clip_norm=0.5)
CONFIG = ExperimentConfig(model=MODEL, task=TASK, training=TRAINING)
MESHES = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(data=1, fsdp=8),
    "data 2 x fsdp 4": dict(data=2, fsdp=4),
    "data 4 x fsdp 2, gathered once": dict(data=4, fsdp=2, gather="step"),
    "half of the devices": dict(data=1, fsdp=4),
}


def of(model):
    return dataclasses.replace(CONFIG, model=model)


def over(mesh, config=CONFIG, **training):
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        training=dataclasses.replace(config.training, **training),
    )


def steps_of(config, mesh):
    """The compiled step and the first state, on one device or over a mesh."""
    task = tasks.make(config.task)
    step = make_train_step(
        config.model, config.training, task.window_passes(config.model.passes),
        task.scored_per_window, mesh=mesh, gather=config.mesh.gather,
    )  # fmt: skip
    state = init_train_state(config.model, config.training)
    return step, state if mesh is None else jax.device_put(state, sharding.of_state(mesh, state))


def trained(config, mesh=None):
    """State after all steps, and each step's metrics."""
    step, state = steps_of(config, mesh)
    rows = sharding.local_rows(mesh, config.training.batch_size) if mesh is not None else None
    metrics = []
    for batch in tasks.batches(
        tasks.make(config.task), "train", config.training.batch_size,
        num_batches=config.training.steps, rows=rows,
    ):  # fmt: skip
        if mesh is not None:
            batch = sharding.place_batch(mesh, batch, config.training.batch_size)
        state, row = step(state, batch)
        metrics.append(jax.device_get(row))
    return jax.device_get(state), metrics


@functools.cache
def on_one_device(model=MODEL):
    return trained(of(model))


# A step over eight virtual devices takes half a minute to compile.
FAST = ("data 2 x fsdp 4",)
CASES = [
    pytest.param(
        mesh, model, id=f"{name}, {size}",
        marks=() if name in FAST and size == "small" else pytest.mark.slow,
    )
    for name, mesh in MESHES.items()
    for size, model in (("small", MODEL), ("large", LARGE))
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "model"), CASES)
def test_steps_over_a_mesh_are_those_of_one_device(mesh, model):
    """Losses, gradient norms and the parameters after three steps of Muon and AdamW."""
    config = over(mesh, of(model))
    state, metrics = trained(config, sharding.make_mesh(config, jax.devices()))
    expected, expected_metrics = on_one_device(model)
    assert_agree(metrics, expected_metrics, tol=1e-5)
    assert_agree(state.params, expected.params, tol=GRADIENTS)


@pytest.mark.slow
def test_gradients_through_the_last_pass_are_those_of_one_device():
    """Whose parameters are constants in the passes before, split or not."""
    last = dataclasses.replace(MODEL, gradient_passes=1)
    config = over(dict(data=2, fsdp=4), of(last))
    state, metrics = trained(config, sharding.make_mesh(config, jax.devices()))
    expected, expected_metrics = on_one_device(last)
    assert_agree(metrics, expected_metrics, tol=1e-5)
    assert_agree(state.params, expected.params, tol=GRADIENTS)


@pytest.mark.parametrize(
    "mesh",
    [None, pytest.param(dict(data=4, fsdp=2), marks=pytest.mark.slow)],
    ids=["one device", "mesh"],
)
def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(mesh):
    """Gradient accumulation, though parts have different numbers of scored positions."""
    config = over(mesh or {}, parts=2)
    made = sharding.make_mesh(config, jax.devices()) if mesh else None
    state, metrics = trained(config, made)
    expected, expected_metrics = on_one_device()
    assert_agree(metrics, expected_metrics, tol=1e-5)
    assert_agree(state.params, expected.params, tol=GRADIENTS)


def compiled(mesh, **arguments):
    """The step over a mesh as a program to read, and its first state."""
    lowered, state = _lowered(mesh, **arguments)
    return Program(lowered.compile()), state


def lowered_step(mesh, **arguments):
    return _lowered(mesh, **arguments)[0]


def _lowered(mesh, batch_size=16, gather="block", **model):
    config = over(
        dict(mesh, gather=gather), of(dataclasses.replace(MODEL, **model)), batch_size=batch_size
    )
    made = sharding.make_mesh(config, jax.devices())
    step, state = steps_of(config, made)
    batch = next(tasks.batches(tasks.make(TASK), "train", batch_size, num_batches=1))
    return step.lower(state, sharding.place_batch(made, batch, batch_size)), state


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(("fsdp", 8),), (("data", 2), ("fsdp", 4))], ids=["8", "2 x 4"])
def test_what_travels_does_not_grow_with_the_batch(mesh):
    """No collective carries features, keys or states: only parameters, gradients, scalars."""
    programs = (compiled(mesh, batch_size=size)[0] for size in (16, 32))
    small, large = (collections.Counter(program.collectives) for program in programs)
    assert small == large


def test_over_data_alone_each_gradient_travels_once():
    """One sum of all gradients and metrics; then every device gives the matrices that it
    orthogonalised. No parameter is gathered."""
    program, state = compiled((("data", 8),))
    total = collections.Counter()
    for kind, size in program.collectives:
        total[kind] += size
    params = jax.tree.leaves(state.params)
    scalars = 8  # the loss and the accuracy
    assert set(total) == {"all-reduce", "all-gather"}
    assert total["all-reduce"] == sum(p.nbytes for p in params) + scalars + 4  # the norm's sum
    assert total["all-gather"] == sum(
        -(-count // 8) * 8 * size * 4 for size, count in matrices(state.params)
    )


def test_over_fsdp_only_parameters_are_gathered():
    """A block's where it runs; and the optimizer exchanges matrices, there and back."""
    program, state = compiled((("fsdp", 8),))
    of_a_block = {leaf.nbytes // leaf.shape[0] for _, leaf in leaves(state.params)}
    whole = of_a_block | {leaf.nbytes for _, leaf in leaves(state.params)}
    assert {size for kind, size in program.collectives if kind == "all-gather"} <= whole
    exchanged = [size for kind, size in program.collectives if kind == "all-to-all"]
    # A device's part of all matrices of a shape.
    shares = [-(-count // 8) * size * 4 for size, count in matrices(state.params)]
    assert sorted(exchanged) == sorted(2 * shares)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_their_gradients_travel_in_the_dtype_of_the_products(dtype):
    """Read before XLA, which on CPU widens what is bfloat16."""
    lowered = lowered_step((("fsdp", 8),), compute_dtype=dtype).as_text()
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    for operation in ("all_gather", "reduce_scatter"):
        results = re.findall(rf"stablehlo\.{operation}.*?-> tensor<[\dx]*(\w+)>", lowered, re.S)
        assert results and set(results) == {short}, operation


@pytest.mark.slow
def test_gathered_once_a_step_every_parameter_travels_once_there_and_back():
    program, state = compiled((("fsdp", 8),), gather="step")
    split = [x for _, x in leaves(state.params) if not x.sharding.is_fully_replicated]
    kinds = collections.Counter(kind for kind, _ in program.collectives)
    assert kinds["all-gather"] == kinds["reduce-scatter"] == len(split)


@pytest.mark.slow
def test_a_pass_that_no_gradient_reaches_gathers_its_matrices_once():
    """On its way forward; one that gradients run through gathers them on the way back, too."""
    shape = re.compile(r"stablehlo\.all_gather.*-> tensor<(\d+)x\d+xf32>")

    def gathers(passes, k):
        chosen = dict(passes=passes, gradient_passes=k, unroll=True)
        rows = shape.findall(lowered_step((("fsdp", 8),), **chosen).as_text())
        return sum(int(number) != MODEL.conv_width for number in rows)

    once, twice = (gathers(4, k) - gathers(3, k) for k in (1, None))
    assert 0 < once
    assert twice == 2 * once


def test_a_device_holds_its_share_of_parameters_and_optimizer_state():
    """At most 1.1 / 8 of all bytes at fsdp = 8, and 1.1 / 4 at 2 x 4."""
    wide = dataclasses.replace(MODEL, d_model=64, head_dim=32, key_dim=32, value_dim=32)
    state = jax.eval_shape(lambda: init_train_state(wide, TRAINING))
    for mesh, share in ((dict(fsdp=8), 8), (dict(data=2, fsdp=4), 4)):
        made = sharding.make_mesh(over(mesh, of(wide)), jax.devices())
        whole = here = 0
        places = jax.tree.leaves(sharding.of_state(made, state))
        for x, place in zip(jax.tree.leaves(state), places, strict=True):
            whole += x.size * x.dtype.itemsize
            here += math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        assert here <= 1.1 / share * whole


def test_no_parameter_is_without_a_rule():
    """Every array of every kind of model has its axes in the table, as many as it has."""
    for change in (dict(), dict(mlp="swiglu"), dict(tie_embeddings=True)):
        model = dataclasses.replace(MODEL, **change)
        shapes = jax.eval_shape(lambda model=model: init_train_state(model, TRAINING).params)
        for path, leaf in leaves(shapes):
            assert len(sharding.PARAMETER_AXES[path[-1].key]) == leaf.ndim, path


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def matrices(params):
    """(size, number) of the matrices that Muon takes, for each shape and way of splitting."""
    count = collections.Counter()
    kinds = jax.tree.leaves(labels(params))
    for leaf, kind in zip(jax.tree.leaves(params), kinds, strict=True):
        if kind == "muon":
            count[leaf.shape[1:], leaf.sharding.spec] += leaf.shape[0]
    return [(math.prod(shape), number) for (shape, _), number in count.items()]


@pytest.mark.parametrize(
    ("mesh", "training", "message"),
    [
        (
            dict(fsdp=16),
            {},
            r"mesh.fsdp=16: it must divide the 8 devices there are, and divide model.d_model=16; "
            r"allowed: 1, 2, 4, 8; the nearest is 8",
        ),
        (dict(fsdp=3), {}, r"mesh.fsdp=3: .*; allowed: 1, 2, 4, 8; the nearest is 2"),
        (
            dict(data=3, fsdp=4),
            {},
            r"mesh.data=3: with mesh.fsdp=4, 12 are more than the 8 devices there are; "
            r"allowed: 1, 2; the nearest is 2",
        ),
        (
            dict(data=3),
            {},
            r"mesh.data=3: training.batch_size=16 is no multiple of 3 x 1 \(mesh.fsdp\) x "
            r"1 \(training.parts\); allowed: 1, 2, 4, 8; the nearest is 2",
        ),
        (dict(), dict(batch_size=12), "8 x 1 x 1; the nearest is 8; or set mesh.data=6"),
        (
            dict(data=4),
            dict(batch_size=12, parts=2),
            "mesh.data=4: .*; allowed: 1, 2, 3, 6; the nearest is 3",
        ),
        (
            dict(data=2, fsdp=4),
            dict(batch_size=10),
            "batch_size=10 must be a multiple .* 2 x 4 x 1; the nearest is 8$",
        ),
    ],
    ids=["too many", "uneven", "too many in all", "uneven batch", "batch", "parts", "no data"],
)
def test_a_mesh_that_does_not_fit_is_answered_with_the_nearest_that_does(mesh, training, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(over(mesh, **training), jax.devices())


@pytest.mark.parametrize("num_devices", [1, 6, 8])
def test_whoever_follows_the_advice_gets_a_mesh(num_devices):
    """Over all small meshes: what fits is taken, by the definition; for what does not, the nearest
    that is told fits, at the latest when each field has been mended once."""
    for data, fsdp, batch in itertools.product((None, 1, 2, 3, 4, 9), (1, 2, 3, 8, 16), (5, 8, 24)):
        wanted = num_devices // fsdp if data is None else data
        fits = (
            0 < wanted * fsdp <= num_devices and 16 % fsdp == batch % (wanted * fsdp) == 0
            and (data is not None or num_devices % fsdp == 0)
        )  # fmt: skip
        values = {"mesh.data": data, "mesh.fsdp": fsdp, "training.batch_size": batch}
        for mended in range(4):
            mesh = {"data": values["mesh.data"], "fsdp": values["mesh.fsdp"]}
            config = over(mesh, batch_size=values["training.batch_size"])
            try:
                shape = sharding.mesh_shape(config, num_devices)
            except ConfigError as error:
                field, near = re.match(r"([\w.]+)=.*; the nearest is (\d+)", str(error)).groups()
                values[field] = int(near)
                continue
            assert fits == (mended == 0), values
            assert shape == (wanted, fsdp) or not fits
            break
        else:
            raise AssertionError(f"no end of advice for {data}, {fsdp}, {batch}")
