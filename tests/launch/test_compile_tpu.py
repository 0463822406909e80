"""`launch.compile` on the TPU's own compiler, for topologies that are not here: `make test-tpu`."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from launch.compile import costs, report, steps, topologies
from sleepnet.config import ConfigError, MeshConfig, ModelConfig, TrainingConfig
from sleepnet.evaluation.programs import Program
from sleepnet.experiment import ExperimentConfig
from sleepnet.tasks import Rule110Config

pytestmark = pytest.mark.tpu
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=256, pattern="AGAG", d_model=256, num_heads=2, window=256, passes=3,
        compute_dtype="bfloat16", remat="window+pass+block",
    ),
    task=Rule110Config(cells=62, window=256, strings=3, questions=3),
    training=TrainingConfig(steps=4, batch_size=8, parts=2),
    mesh=MeshConfig(fsdp=4),
)  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        yield


def test_the_tpu_compiler_is_here():
    assert importlib.util.find_spec("libtpu"), "pip install -e '.[tpu,test]'"


@pytest.fixture(scope="module")
def program():
    with jax.numpy_dtype_promotion("standard"):
        return Program(steps.train(CONFIG, topologies.topology("v5e:2x2")).lower().compile())


def test_recomputed_forward_passes_are_in_the_flops(program):
    """Window and block by block, the forward pass runs three times and the backward pass is two
    more: five where the model counts three. Within 15%: the last pass of a window computes no more
    than it must, and the optimizer comes on top."""
    model_flops = steps.train(CONFIG, topologies.topology("v5e:2x2")).flops
    assert program.dot_flops == pytest.approx(5 / 3 * model_flops, rel=0.15)


def test_gradients_are_scattered_where_blocks_run(program):
    """No collective moves all parameters of a part at once: the largest is one matrix, or the
    embedding; and gradients are scattered as often as a block's backward pass runs."""
    matrix = 2 * 4 * CONFIG.model.d_model**2  # bfloat16
    in_blocks = [x for x in program.exchanges if x.kind in ("all-gather", "reduce-scatter")]
    assert max(x.size for x in in_blocks) <= matrix
    assert max(x.times for x in in_blocks if x.kind == "reduce-scatter") > 1
    assert all(x.group == 4 for x in in_blocks)


def test_written_out_the_compiler_counts_the_same():
    """The compiler's own count, which takes loops once, has norms and gates on top."""
    model = dataclasses.replace(CONFIG.model, pattern="A", passes=1, remat="none", unroll=True)
    topology = topologies.topology("v5e:2x2")
    place = SingleDeviceSharding(topology.devices[0])
    params, _ = steps.shapes(model, 1)
    tokens = jax.ShapeDtypeStruct((1, 2, 256), jnp.int32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, tokens)
    )

    def loss(params, tokens_BWL):
        import sleepnet

        mask = jnp.ones(tokens_BWL.shape, bool)
        seen = sleepnet.rollout(params, tokens_BWL, None, tokens_BWL, mask, config=model)
        return jnp.sum(seen.nll_BWL)

    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    counted = compiled.cost_analysis()["flops"]
    assert Program(compiled).dot_flops == pytest.approx(counted, rel=0.05)


def test_a_program_that_is_too_large_is_a_row_that_says_so():
    """The compiler's own word on memory, and what would help."""
    model = dataclasses.replace(CONFIG.model, remat="none", vocab_size=400_000)
    config = dataclasses.replace(
        CONFIG, model=model, training=TrainingConfig(steps=4, batch_size=512)
    )
    topology = topologies.topology("v5e:2x2")
    row = costs.measure(steps.train(config, topology), config, topology, quick=True)
    assert row.problem is not None and row.problem.startswith("the compiler finds no room: needs")
    assert "training.parts=2" in str(row.help)


def test_every_step_compiles_quickly_for_a_pod():
    found = report.report(CONFIG, "v5p:2x2x1", quick=True)
    assert found.fits
    assert [row.bound is not None for row in found.rows] == [True] * 3


def test_a_shape_that_no_slice_has_names_the_nearest():
    with pytest.raises(ConfigError, match=r"nearest is v5e:4x4"):
        topologies.topology("v5e:3x5")
