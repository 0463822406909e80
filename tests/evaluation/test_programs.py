"""Reading compiled programs: loops and collectives as the compilers for CPU and TPU write them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from minds import params

import sleepnet
from sleepnet.evaluation.programs import Exchange, Program

# After what XLA for TPU writes: no trip count, a collective spread over three fusions.
TPU_TEXT = """HloModule jit_f

%gathering.1 (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[16,8]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}

%gathering.2 (p.2: f32[4,8]) -> f32[16,8] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[16,8]{1,0} all-gather(%p.2), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}

%body (b: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%b), index=1
  %fusion.1 = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%gathering.1
  %fusion.2 = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%gathering.2
  %collective-permute-start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2
  %product = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0}) tuple(%i, %x)
}

%condition (c: (s32[], f32[4,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3), metadata={op_name="f"}
  %c = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %constant.1), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %while.1 = (s32[]{:T(128)}, f32[4,8]{1,0}) while(%a), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


class Compiled:
    """Stands for the compiler's result."""

    def __init__(self, text):
        self.as_text = lambda: text


def test_a_tpu_program_counts_its_loops_and_each_collective_once():
    program = Program(Compiled(TPU_TEXT))
    assert (
        sorted(program.collectives)
        == [("all-gather", 4 * 16 * 8)] * 3 + [("collective-permute", 4 * 4 * 8)] * 3
    )
    assert program.dot_flops == 3 * 2 * 4 * 4 * 8


def test_a_loop_without_a_count_is_no_guess():
    with pytest.raises(ValueError, match="cannot read"):
        _ = Program(Compiled(TPU_TEXT.replace("direction=LT", "direction=NE"))).dot_flops


def test_collectives_of_their_own_may_share_a_channel():
    """As those that overlap with nothing do on TPU; in two loops, one after the other, they are
    two."""
    start = TPU_TEXT.index("%body ")
    end = TPU_TEXT.index("ENTRY")
    again = (
        TPU_TEXT[start:end].replace("%body ", "%body.2 ").replace("%condition ", "%condition.2 ")
    )
    text = (TPU_TEXT[:end] + again + TPU_TEXT[end:]).replace(
        "  ROOT %out",
        "  %while.2 = (s32[]{:T(128)}, f32[4,8]{1,0}) while(%while.1), condition=%condition.2, "
        "body=%body.2\n  ROOT %out",
    )
    permutes = [x for x in Program(Compiled(text)).exchanges if x.kind == "collective-permute"]
    assert sum(x.times for x in permutes) == 6


def test_several_arrays_of_one_collective_are_all_counted():
    """Results of a variadic all-reduce, and those of an all-to-all, are a tuple."""
    text = TPU_TEXT.replace(
        "ROOT %all-gather.1 = f32[16,8]{1,0} all-gather(%p)",
        "ROOT %all-gather.1 = (f32[16,8]{1,0}, bf16[6]{0}) all-gather(%p, %q)",
    ).replace("calls=%gathering.2", "kind=kCustom")
    found = Program(Compiled(text)).collectives
    assert ("all-gather", 4 * 16 * 8 + 2 * 6) in found and len(found) == 6


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("f32[16,8]{1,0} all-gather(", "c64[16,8]{1,0} all-gather("),
        (
            "fusion(%x), kind=kCustom, calls=%gathering.1",
            "conditional(%i, %x, %x), branch_computations={%gathering.1, %gathering.2}",
        ),
    ],
)
def test_what_cannot_be_read_is_no_guess(written, instead):
    """An unknown dtype, and branches of which one runs."""
    with pytest.raises(ValueError, match="cannot read"):
        _ = Program(Compiled(TPU_TEXT.replace(written, instead))).collectives


def test_branches_without_products_count_nothing():
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, jnp.tanh, jnp.exp, x @ x)

    program = Program(jax.jit(f).lower(jnp.ones((8, 8))).compile())
    assert program.dot_flops == 2 * 8**3
    kept = program.module.computations[program.module.entry].values()
    assert "conditional" in {instruction.operation for instruction in kept}


def test_loops_within_loops_multiply():
    def f(x):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    program = Program(jax.jit(f).lower(jnp.ones((8, 8))).compile())
    assert program.dot_flops == 15 * 2 * 8**3


def test_collectives_are_read_with_their_bytes():
    devices = jax.local_devices()[:4]
    gather = functools.partial(jax.lax.all_gather, axis_name="d")
    run = jax.pmap(lambda x: gather(x) + 1, axis_name="d", devices=devices)
    program = Program(run.lower(jnp.ones((4, 10), jnp.float32)).compile())
    assert program.collectives == [("all-gather", 4 * 4 * 10)]


# Products as XLA for TPU writes them: alone; a batch axis as the window's; a window turned around.
CONVOLUTIONS = [
    ("bf16[2048,64]", "bf16[32,64]", "bf16[2048,32]", "dim_labels=bf_oi->bf", 1, 2048 * 32 * 64),
    (
        "f32[32,6,64,128]", "f32[32,6,64,16]", "f32[32,6,128,16]",
        "window={size=32x6 stride=31x5 lhs_dilate=32x6}, dim_labels=01fb_01io->01bf, "
        "operand_precision={highest,highest}",
        6, 32 * 6 * 128 * 16 * 64,
    ),
    (
        "bf16[2048,768,1]", "bf16[6,128,768]", "bf16[2048,6,128]",
        "window={size=6 pad=5_5 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
        1, 2048 * 768 * 768,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "out", "attributes", "passes", "products"), CONVOLUTIONS)
def test_convolutions_count_as_the_products_they_are(
    left, right, out, attributes, passes, products
):
    """And those of float32 at the highest precision as six on the matrix unit."""
    text = f"""HloModule m

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left}{{1,0}} parameter(0)
  %b = {right}{{1,0}} parameter(1)
  ROOT %c = {out}{{1,0}} convolution(%a, %b), {attributes}, metadata={{op_name="f"}}
}}
"""
    program = Program(Compiled(text))
    assert program.dot_flops == 2 * products
    assert program.matrix_unit_flops == passes * 2 * products


MEMORY_TEXT = """HloModule m

%fused (p0: f32[8,64], p1: s32[], p2: f32[64]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64]{0} parameter(2)
  %s = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,64}
  %r = f32[1,64]{1,0} bitcast(%p2)
  %sum = f32[1,64]{1,0} add(%s, %r)
  ROOT %u = f32[8,64]{1,0} dynamic-update-slice(%p0, %sum, %p1, %p1)
}

%body (b: (s32[], f32[8,64], f32[64])) -> (s32[], f32[8,64], f32[64]) {
  %b = (s32[], f32[8,64]{1,0}, f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%b), index=1
  %y = f32[64]{0} get-tuple-element(%b), index=2
  %near = f32[64]{0:T(128)S(1)} copy(%y)
  %new = f32[8,64]{1,0} fusion(%x, %i, %near), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[8,64]{1,0}, f32[64]{0}) tuple(%i, %new, %y)
}

%condition (c: (s32[], f32[8,64], f32[64])) -> pred[] {
  %constant.1 = s32[] constant(5)
  %c = (s32[], f32[8,64]{1,0}, f32[64]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i.2, %constant.1), direction=LT
}

ENTRY %main (a: (s32[], f32[8,64], f32[64])) -> (s32[], f32[8,64], f32[64]) {
  %a = (s32[], f32[8,64]{1,0}, f32[64]{0}) parameter(0)
  ROOT %w = (s32[], f32[8,64]{1,0}, f32[64]{0}) while(%a), condition=%condition, body=%body
}
"""


def test_memory_is_counted_where_it_is_moved():
    """Each of five times: a copy into fast memory reads 64 numbers; the fusion reads a slice of 64
    and an index, not what lies in fast memory, and writes a slice of 64 in place."""
    assert Program(Compiled(MEMORY_TEXT)).hbm_bytes == 5 * (64 + 64 + 1 + 64) * 4


def test_written_out_the_compiler_counts_the_same_bytes():
    """A rollout of two windows on CPU, which has no memory of another kind: within 5%."""
    config = sleepnet.ModelConfig(
        vocab_size=64, pattern="A", d_model=64, num_heads=2, window=64, passes=1, unroll=True
    )
    tokens = jnp.zeros((1, 2, 64), jnp.int32)

    def loss(params):
        mask = jnp.ones(tokens.shape, bool)
        seen = sleepnet.rollout(params, tokens, None, tokens, mask, config=config)
        return jnp.sum(seen.nll_BWL)

    compiled = jax.jit(loss).lower(params(config)).compile()
    counted = compiled.cost_analysis()["bytes accessed"]
    assert Program(compiled).hbm_bytes == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        ("all-gather", 800, 700), ("reduce-scatter", 100, 700), ("all-reduce", 800, 1400),
        ("all-to-all", 800, 700),
    ],
)  # fmt: skip
def test_in_a_ring_all_but_ones_own_share_is_sent(kind, size, sent):
    """By each of eight devices; a sum that all get takes two rounds."""
    assert Exchange(kind, size, group=8, times=3).sent == 3 * sent


@pytest.mark.parametrize(
    "groups", ["{{0,1,2,3}}", "[2,4]<=[8]", "mesh['x'=4,'y'=2] {'x'}", "{{0,1,2,3},{4,5,6,7}}"]
)
def test_groups_are_read_in_every_form(groups):
    text = TPU_TEXT.replace("{{0,1,2,3}}", groups)
    gathers = [x for x in Program(Compiled(text)).exchanges if x.kind == "all-gather"]
    assert [x.group for x in gathers] == [4]
