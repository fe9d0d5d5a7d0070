"""Soft assignment on a TPU (Mosaic): a running softmax over blocks of codes, and its gradients.

Logits are ``[codes, vectors]``, as in ``pallas_tpu``; products are float32 at ``HIGHEST``.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from repalign.kernels import tuning

LANES = 128


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _logits(z_ref, codes_ref, offsets_ref) -> jax.Array:
    return 2.0 * _product(codes_ref[...], z_ref[...], (1, 1)) + offsets_ref[...]


def _forward_kernel(
    z_ref, codes_ref, offsets_ref, normalizer_ref, mean_ref, maximum_ref, total_ref
):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        # A finite start, because -inf - -inf is NaN where the first block has weight zero.
        lowest = jnp.finfo(jnp.float32).min
        maximum_ref[...] = jnp.full(maximum_ref.shape, lowest, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        mean_ref[...] = jnp.zeros(mean_ref.shape, jnp.float32)

    logits = _logits(z_ref, codes_ref, offsets_ref)
    old = maximum_ref[...]
    maximum = jnp.maximum(old, jnp.max(logits, axis=0, keepdims=True))
    scale = jnp.exp(old - maximum)
    weights = jnp.exp(logits - maximum)
    maximum_ref[...] = maximum
    total_ref[...] = total_ref[...] * scale + jnp.sum(weights, axis=0, keepdims=True)
    mean_ref[...] = mean_ref[...] * scale + _product(codes_ref[...], weights, (0, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total = total_ref[...]
        normalizer_ref[...] = maximum_ref[...] + jnp.log(total)
        mean_ref[...] = mean_ref[...] / total


def _weights_and_gradient(z_ref, codes_ref, offsets_ref, normalizer_ref, common_ref, d_mean_ref):
    """Returns the softmax p and dL/dlogits = p * (d_normalizer + <d_mean, c - mean>)."""
    weights = jnp.exp(_logits(z_ref, codes_ref, offsets_ref) - normalizer_ref[...])
    along = _product(codes_ref[...], d_mean_ref[...], (1, 1))
    return weights, weights * (common_ref[...] + along)


def _vectors_kernel(*refs):
    *inputs, d_z_ref, mass_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_z_ref[...] = jnp.zeros(d_z_ref.shape, jnp.float32)
        mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)

    _, d_logits = _weights_and_gradient(*inputs)
    d_z_ref[...] += 2.0 * _product(inputs[1][...], d_logits, (0, 0))
    mass_ref[...] += jnp.sum(d_logits, axis=0, keepdims=True)


def _codes_kernel(*refs):
    *inputs, d_codes_ref, mass_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_codes_ref[...] = jnp.zeros(d_codes_ref.shape, jnp.float32)
        mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)

    z_ref, d_mean_ref = inputs[0], inputs[-1]
    weights, d_logits = _weights_and_gradient(*inputs)
    d_codes_ref[...] += 2.0 * _product(d_logits, z_ref[...], (1, 0)) + _product(
        weights, d_mean_ref[...], (1, 0)
    )
    mass_ref[...] += jnp.sum(d_logits, axis=1, keepdims=True)


def _pad(x: jax.Array, axis: int, length: int, value: float = 0.0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


class _Call:
    """Shapes and blocks that the three kernels share."""

    def __init__(self, z, codebook, vector_block, code_block):
        vectors, dim = z.shape
        codes = codebook.shape[0]
        if vector_block is None or code_block is None:
            size = 512 if dim <= LANES else 256
            found = tuning.lookup(
                "codebook/soft_assignment",
                {"vectors": vectors, "codes": codes, "dim": dim},
                jnp.float32,
                heuristic={"vector_block": size, "code_block": size},
            )
            vector_block = vector_block or found["vector_block"]
            code_block = code_block or found["code_block"]
        if vector_block % LANES or code_block % 8:
            raise ValueError(
                f"blocks of {vector_block} vectors and {code_block} codes: multiples of {LANES} "
                "and 8 are needed."
            )
        self.dim = dim
        self.vector_block = min(vector_block, pl.cdiv(vectors, LANES) * LANES)
        self.code_block = min(code_block, pl.cdiv(codes, 8) * 8)
        self.vectors = pl.cdiv(vectors, self.vector_block) * self.vector_block
        self.codes = pl.cdiv(codes, self.code_block) * self.code_block

    def inputs(self, z, codebook, log_weights):
        offsets = log_weights - jnp.sum(jnp.square(codebook), axis=1)
        return (
            _pad(z, 0, self.vectors),
            _pad(codebook, 0, self.codes),
            _pad(offsets, 0, self.codes, -jnp.inf)[:, None],
        )

    def run(self, body, inputs, outputs, *, vectors_first: bool, products: int, scratch_shapes=()):
        """Calls ``body`` on every pair of blocks; the grid's last axis is the one summed over.

        Arrays come with what they are cut along: their rows are ``"vectors"`` or ``"codes"``, or
        their columns are vectors (``"last"``).
        """
        counts = (self.vectors // self.vector_block, self.codes // self.code_block)

        def spec(shape, of):
            axis = 0 if (of != "codes") == vectors_first else 1
            if of == "last":
                return pl.BlockSpec((shape[0], self.vector_block), lambda *ids: (0, ids[axis]))
            block = self.vector_block if of == "vectors" else self.code_block
            return pl.BlockSpec((block, shape[1]), lambda *ids: (ids[axis], 0))

        return pl.pallas_call(
            body,
            grid=counts if vectors_first else counts[::-1],
            in_specs=[spec(x.shape, of) for x, of in inputs],
            out_specs=[spec(shape, of) for shape, of in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in outputs],
            scratch_shapes=scratch_shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * self.vectors * self.codes * self.dim,
                transcendentals=self.vectors * self.codes,
                bytes_accessed=4 * sum(x.size for x, _ in inputs)
                + 4 * sum(rows * columns for (rows, columns), _ in outputs),
            ),
            name=body.__name__.strip("_"),
        )(*(x for x, _ in inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def soft_assignment(
    z: jax.Array,
    codebook: jax.Array,
    log_weights: jax.Array,
    vector_block: int | None = None,
    code_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``repalign.kernels.codebook.api.soft_assignment`` (temperature 1, no shift).

    The two optional arguments are the sizes of a block, multiples of 128 and of 8; None looks them
    up.
    """
    call = _Call(z, codebook, vector_block, code_block)
    rows, codes, offsets = call.inputs(z, codebook, log_weights)
    normalizer, mean = call.run(
        _forward_kernel,
        [(rows, "vectors"), (codes, "codes"), (offsets, "codes")],
        [((1, call.vectors), "last"), ((call.dim, call.vectors), "last")],
        vectors_first=True,
        products=2,
        scratch_shapes=[pltpu.VMEM((1, call.vector_block), jnp.float32)] * 2,
    )
    count = z.shape[0]
    return normalizer[0, :count] - jnp.sum(jnp.square(z), axis=1), mean[:, :count].T


def _soft_assignment_forward(z, codebook, log_weights, vector_block, code_block):
    log_normalizer, mean = soft_assignment(z, codebook, log_weights, vector_block, code_block)
    return (log_normalizer, mean), (z, codebook, log_weights, log_normalizer, mean)


def _soft_assignment_backward(vector_block, code_block, residuals, cotangents):
    z, codebook, log_weights, log_normalizer, mean = residuals
    d_normalizer, d_mean = cotangents
    call = _Call(z, codebook, vector_block, code_block)
    rows, codes, offsets = call.inputs(z, codebook, log_weights)
    normalizer = log_normalizer + jnp.sum(jnp.square(z), axis=1)
    common = d_normalizer - jnp.sum(d_mean * mean, axis=1)
    inputs = [
        (rows, "vectors"),
        (codes, "codes"),
        (offsets, "codes"),
        # A padded vector has infinite mass to share, so its weights are exactly zero.
        (_pad(normalizer, 0, call.vectors, jnp.inf)[None], "last"),
        (_pad(common, 0, call.vectors)[None], "last"),
        (_pad(d_mean, 0, call.vectors), "vectors"),
    ]
    per_vector = [((call.dim, call.vectors), "last"), ((1, call.vectors), "last")]
    per_code = [((call.codes, call.dim), "codes"), ((call.codes, 1), "codes")]
    d_z, mass = call.run(_vectors_kernel, inputs, per_vector, vectors_first=True, products=3)
    d_z = d_z.T[: z.shape[0]] - 2.0 * z * mass[0, : z.shape[0], None]
    d_codes, mass = call.run(_codes_kernel, inputs, per_code, vectors_first=False, products=4)
    d_codes, mass = d_codes[: codebook.shape[0]], mass[: codebook.shape[0]]
    return d_z, d_codes - 2.0 * codebook * mass, mass[:, 0]


soft_assignment.defvjp(_soft_assignment_forward, _soft_assignment_backward)
