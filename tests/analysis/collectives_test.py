"""Collectives read off HLO text: a text by hand, and programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from thinking_lm.analysis.collectives import Collective, crossed, groups, read, travelled

TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={2,16}
}

%cond (c: (s32[], bf16[4,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  %all-reduce-scatter.2 = f32[2,16]{1,0} fusion(%all-gather.1), kind=kCustom, calls=%fused.1
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %all-gather.1)
}

%until (u: (s32[], bf16[4,8])) -> pred[] {
  ROOT %any = pred[] compare(%a, %b), direction=NE
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%start), condition=%cond, body=%body
  %while.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%start), condition=%until, body=%body
  %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %done = bf16[4,8]{1,0} collective-permute-done(%permute)
  ROOT %two = (f32[3]{0}, f32[5]{0}) all-reduce(%c, %d), to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run_and_fusions_are_reduce_scatters():
  found, unknown = read(TPU)
  assert unknown == 1
  assert found == {
    "all-gather": Collective(2, 6, 6 * 64),
    "all-reduce": Collective(1, 1, 32),
    "collective-permute": Collective(1, 1, 64),
    "reduce-scatter": Collective(2, 6, 6 * 512),
  }
  assert travelled(found) == 6 * 64 + 2 * 32 + 64 + 6 * 512


SLICED = """HloModule jit_step, is_scheduled=true

%until (c: (bf16[4,8], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(16)
  %i = u32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%twice (b: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %i = u32[] get-tuple-element(%b), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %recv.3 = (bf16[2,8]{1,0}, u32[], token[]) recv(%after), is_host_transfer=true, HOST
  %send.3 = (bf16[2,8]{1,0}, u32[], token[]) send(%x, %after), is_host_transfer=true, HOST
  %recv-done.3 = (bf16[2,8]{1,0}, token[]) recv-done(%recv.3), channel_id=1, is_host_transfer=true
  ROOT %t = (bf16[4,8]{1,0}, u32[]) tuple(%x, %next)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  ROOT %while.1 = (bf16[4,8]{1,0}, u32[]) while(%start), condition=%until, body=%twice
}
""".replace("HOST", 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')


def test_what_crosses_between_slices_is_counted_apart_and_unrolled_loops_run_less_often():
  found, unknown = read(SLICED)
  assert unknown == 0
  assert found == {"all-reduce between slices": Collective(1, 8, 8 * 32)}
  assert travelled(found) == 0 and crossed(found, slices=4) == 2 * 3 / 4 * 8 * 32


@pytest.mark.parametrize(
  ("written", "expected"),
  [
    ("all-reduce(%a), replica_groups={{0,1,2},{3,4,5}}, to_apply=%add", [[0, 1, 2], [3, 4, 5]]),
    ("collective-permute(%a), source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("all-reduce(%a), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("all-gather(%a), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
    ("all-gather(%a), replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("all-reduce(%a), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
  ],
)
def test_who_takes_part(written, expected):
  assert groups(f"  %x = f32[4] {written}") == expected
  slices = read(f"ENTRY %main (a: f32[2]) -> f32[4] {{\n  %x = f32[4] {written}\n}}", within=2)[0]
  crosses = any(len({device // 2 for device in group}) > 1 for group in expected)
  assert all(kind.endswith("between slices") is crosses for kind in slices) and len(slices) == 1


def test_what_does_not_say_who_takes_part_is_an_error():
  with pytest.raises(ValueError, match="no groups are known"):
    groups("  %x = f32[4] all-reduce(%a), replica_groups={}, to_apply=%add")


def test_a_compiled_loop_of_known_collectives():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, P("x"))

  def program(x, w_L):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w_L)[0]

  x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split)
  w = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
  found, unknown = read(jax.jit(program, out_shardings=split).lower(x, w).compile().as_text())
  assert unknown == 0
  assert sum(collective.runs for collective in found.values()) == 7, "one for each layer, of what travels less"
