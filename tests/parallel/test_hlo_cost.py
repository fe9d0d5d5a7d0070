"""The cost of compiled programs: on programs whose FLOPs and bytes are known, and on TPU text."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
import simulated_devices
from jax import lax

from repalign.parallel.hlo_cost import axes_of, cost, replica_group
from repalign.parallel.hlo_text import Shape, parse, trip_count


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_nested_scan_counts_every_iteration():
    def stack(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        def twice_over(x, _):
            return lax.scan(layer, x, weights)[0], None

        return lax.scan(twice_over, x, None, length=5)[0]

    counted = cost(compiled_text(stack, shape(7, 64, 64), shape(32, 64)))
    assert counted.flops == 5 * 7 * 2 * 32 * 64 * 64
    assert counted.notes == ()


def test_the_gradient_of_a_scan_counts_three_times():
    def loss(weights, x):
        return jnp.sum(lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0])

    forward = 6 * 2 * 16 * 64 * 64
    counted = cost(compiled_text(jax.grad(loss), shape(6, 64, 64), shape(16, 64)))
    # Of the first layer's input no gradient is asked for, but a scan computes it all the same.
    assert counted.flops == 3 * forward


def test_a_convolution_counts_no_padding():
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (2, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    counted = cost(compiled_text(convolve, shape(2, 9, 8, 4), shape(3, 3, 4, 16)))
    # Rows: outputs at -1, 1, 3, 5, 7 with 3 taps, one of them outside at either end: 13 of 15.
    # Columns: 8 outputs with 3 taps, one outside at either end: 22 of 24.
    assert counted.flops == 2 * 2 * 4 * 16 * 13 * 22


def test_a_loop_with_an_unknown_end_is_counted_once_and_named():
    def until(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)

    counted = cost(compiled_text(until, shape(32, 32)))
    assert counted.flops == 2 * 32**3
    assert len(counted.notes) == 1 and "number of iterations unknown" in counted.notes[0]


def test_a_slice_costs_its_own_size():
    """Each row is cut out (read, written) and summed (read): not the stack in every iteration."""

    def total(stack):
        return lax.scan(lambda c, row: (c + jnp.sum(row), None), 0.0, stack)[0]

    stack = 100 * 4096 * 4
    moved = cost(compiled_text(total, shape(100, 4096))).hbm_bytes
    assert 3 * stack <= moved < 3.01 * stack


TPU = pathlib.Path(__file__).with_name("tpu_program.hlo").read_text()
"""In the manner of libtpu: a loop from 2 to 12, one gather spread over two fusions, a fused
reduce-scatter, a kernel with a cost estimate, a permutation, and a transposing copy."""


def test_tpu_text():
    counted = cost(TPU, mesh={"data": 2, "fsdp": 4})
    assert counted.flops == 12345 and counted.notes == ()
    gather, scatter, permute = counted.collectives
    assert (gather.count, gather.collective.kind, gather.collective.axes) == (
        10,
        "all-gather",
        "fsdp",
    )
    assert (gather.collective.bytes, gather.collective.sent) == (32, 96)
    assert gather.collective.source == "jit(step)/mlp"
    assert (scatter.collective.kind, scatter.collective.axes) == ("reduce-scatter", "fsdp")
    assert (scatter.collective.bytes, scatter.collective.sent) == (512, 384)
    assert (permute.count, permute.collective.kind, permute.collective.axes) == (
        1,
        "collective-permute",
        "data",
    )
    assert permute.collective.sent == 300 * 100 * 4
    by_name = {one.name: one for one in counted.operations}
    assert by_name["kernel.9"].hbm_bytes == 678
    # 300 rows of 100 fill tiles of 8 x 128: 304 x 128; transposed, 104 x 384.
    assert by_name["copy.9"].hbm_bytes == 4 * (304 * 128 + 104 * 384)
    # What lies in VMEM costs nothing: only the share of the gather is read, in one tile of 8 x 128.
    assert by_name["fusion.5"].hbm_bytes == 2 * 8 * 128


@pytest.mark.parametrize(
    ("direction", "bound", "trips"),
    [("LT", 12, 10), ("LE", 12, 11), ("LT", 1, 0), ("NE", 12, None), ("GT", 12, None)],
)
def test_trip_counts(direction, bound, trips):
    program = parse(
        TPU.replace("direction=LT", f"direction={direction}").replace(
            "constant(12)", f"constant({bound})"
        )
    )
    main = program.computations["main"]
    assert trip_count(program, main, main.instructions["while.9"]) == trips


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")


def test_shapes_with_padding():
    assert Shape("bf16", (2, 3)).bytes == Shape("bf16", (2, 3)).stored_bytes == 12
    assert Shape("f32", (16, 12, 1), (0, 1, 2), (8, 128)).stored_bytes == 4 * 1 * 16 * 128
    assert Shape("s4", (3,)).bytes == 2
    assert Shape("f32", (), (), (128,)).stored_bytes == 4


@pytest.mark.parametrize(
    ("text", "group", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3), "fsdp"),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7), "data+fsdp"),
        ("[2,4]<=[8]", (0, 1, 2, 3), "fsdp"),
        ("[4,2]<=[2,4]T(1,0)", (0, 4), "data"),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3), "fsdp"),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", (0, 1, 2, 3, 4, 5, 6, 7), "data+fsdp"),
        ("mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}", (0, 2), "fsdp"),
        ("mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}", (0, 1), "fsdp"),
    ],
)
def test_groups(text, group, axes):
    assert replica_group(text, 8) == group
    assert axes_of(group, {"data": 2, "fsdp": 4}) == axes


def test_axes_that_cannot_be_told():
    assert axes_of((0, 9), {"data": 2, "fsdp": 4}) == axes_of((0, 1), {}) == "?"


def test_sharded_gradients_are_counted_by_axis():
    weights = 64 * 64 * 4
    assert json.loads(simulated_devices.output(pathlib.Path(__file__))) == {
        # Two of the 16 rows, forward and the gradient of the weights.
        "flops": 2 * 2 * 2 * 64 * 64,
        "all-gather fsdp": [weights / 4, 3 * weights / 4],
        # Of a CPU: summed whole over fsdp, 2 * 3/4 sent; then the quarter over data, 2 * 1/2.
        "all-reduce fsdp": [weights, 1.5 * weights],
        "all-reduce data": [weights / 4, weights / 4],
    }


def _sharded_gradient():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    weights = jax.NamedSharding(mesh, jax.P("fsdp"))
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))

    def gradient(weight, x):
        return jax.grad(lambda w: jnp.sum(jnp.sin(x @ w) ** 2))(weight)

    text = (
        jax.jit(gradient, in_shardings=(weights, rows), out_shardings=weights)
        .lower(shape(64, 64), shape(16, 64))
        .compile()
        .as_text()
    )
    counted = cost(text, mesh=dict(mesh.shape))
    found = {"flops": counted.flops}
    for one in counted.collectives:
        called = one.collective
        found[f"{called.kind} {called.axes}"] = [called.bytes, called.sent]
    return found


if __name__ == "__main__":
    json.dump(_sharded_gradient(), sys.stdout)
