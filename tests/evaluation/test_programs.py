"""Reading compiled programs: loops and collectives as the compilers for CPU and TPU write them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sleepnet.evaluation.programs import Program

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
