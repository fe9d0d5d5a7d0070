"""Every array of golden/losses.npz against our functions, values and gradients.

The table below has one line for each entry of the file. An entry without a line fails, and so does
an array of an entry that its line does not account for.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.latent_maps import relative_representation
from repalign.losses import alignment, clustering, contrastive, joint_embedding, regularizers
from repalign.metrics import similarity
from repalign.quantizers import binary, residual, scalar, vector

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "losses.npz") as archive:
    ARRAYS = dict(archive)
META = json.loads(str(ARRAYS.pop("meta")))
ENTRIES = sorted({key.split("/")[0] for key in ARRAYS})


def gradients(of, loss, inputs, options):
    """The mean value of a loss and its gradients, under the names of the file."""
    arguments = [inputs[name] for name in of]

    def mean(*arguments):
        return jnp.mean(loss(*arguments, **options))

    value, found = jax.jit(jax.value_and_grad(mean, range(len(of))))(*arguments)
    return {"value": value} | {
        f"grad/{name}": gradient for name, gradient in zip(of, found, strict=True)
    }


def pair(loss):
    return lambda inputs, options: gradients("ab", loss, inputs, options)


def sup_con(inputs, options):
    def loss(x, **options):
        return contrastive.sup_con(x, inputs["labels"], **options)

    return gradients("x", loss, inputs, options)


def tico(inputs, options):
    def loss(a, b, **options):
        return joint_embedding.tico(a, b, jnp.zeros([a.shape[1]] * 2), **options)[0]

    return gradients("ab", loss, inputs, options)


def mmcr(inputs, options):
    def loss(a, b, **options):
        return joint_embedding.mmcr(
            jnp.stack([a, 0.9 * a], 1), jnp.stack([b, 0.8 * b], 1), **options
        )

    return gradients("ab", loss, inputs, options)


def swav(inputs, options):
    def loss(h0, h1, l0, l1, **options):
        return clustering.swapped_assignment([h0, h1], [l0, l1], **options)

    return gradients(("h0", "h1", "l0", "l1"), loss, inputs, options)


def dino(inputs, options):
    def loss(*students, **options):
        teachers = [inputs["t0"], inputs["t1"]]
        return clustering.dino(teachers, students, jnp.zeros(12), **options)[0]

    return gradients(("s0", "s1", "s2"), loss, inputs, options)


def matryoshka(inputs, options):
    def loss(logits, **options):
        return alignment.matryoshka_cross_entropy(logits, inputs["labels"], **options)

    return gradients(("logits",), loss, inputs, options)


def similarities(inputs, options):
    a, b = inputs["A"], inputs["B"]
    names = ("cknna", "mutual_knn", "cycle_knn")
    found = {name: getattr(similarity, name)(a, b, topk=options["topk"]) for name in names}
    return found | {
        "cka": similarity.cka(a, b),
        "unbiased_cka": similarity.unbiased_cka(a, b),
        "cka_rbf": similarity.cka(a, b, kernel="rbf", sigma=options["rbf_sigma"]),
    }


def vq_ema(inputs, options):
    result = vector.vector_quantize(inputs["z"], inputs["codebook"])
    statistics = vector.CodebookStatistics(inputs["cluster_size"], inputs["embed_avg"])
    update = vector.ema_update(
        statistics, inputs["z"], result.indices, decay=options["decay"], eps=options["eps"]
    )
    return {
        "quantized": result.quantized,
        "indices": result.indices,
        "commit_loss": jnp.mean(result.loss),
        "codebook_after": update.codebook,
        "cluster_size_after": update.statistics.cluster_size,
    }


def fsq(inputs, options):
    result = scalar.fsq(inputs["z"], levels=options["levels"])
    weights = jnp.arange(1.0, len(options["levels"]) + 1.0)
    weighted = jax.grad(
        lambda z: jnp.sum(scalar.fsq(z, levels=options["levels"]).quantized * weights)
    )
    return {
        "quantized": result.quantized,
        "indices": result.indices,
        "grad_weighted_sum": weighted(inputs["z"]),
    }


def lfq(inputs, options):
    result = binary.lfq(
        inputs["z"],
        entropy_weight=options["entropy_loss_weight"],
        diversity_gamma=options["diversity_gamma"],
        commitment_weight=options["commitment_loss_weight"],
        inv_temperature=options["inv_temperature"],
    )
    return {
        "quantized": result.quantized,
        "indices": result.indices,
        "aux_loss": jnp.mean(result.loss),
    }


def bsq(inputs, options):
    options = {name: value for name, value in options.items() if name != "bits"}
    result = binary.bsq(inputs["z"], **options)
    return {
        "quantized": result.quantized,
        "indices": result.indices,
        "loss": jnp.mean(result.loss),
    }


def sim_vq(inputs, options):
    result = vector.sim_vq(
        inputs["z"],
        inputs["codebook"],
        inputs["transform"].T,
        commitment_weight=options["commitment_weight"],
    )
    return {
        "quantized": result.quantized,
        "indices": result.indices,
        "loss": jnp.mean(result.loss),
    }


def rotation_trick(inputs, options):
    value, pullback = jax.vjp(lambda src: vector.rotate_to(src, inputs["tgt"]), inputs["src"])
    return {"value": value, "grad/src": pullback(inputs["cotangent"])[0]}


def residual_vq(inputs, options):
    result = residual.residual_vector_quantize(inputs["z"], inputs["codebooks"])
    return {"quantized": result.quantized, "indices": result.indices}


TABLE = {
    "nt_xent": pair(contrastive.nt_xent),
    "dcl": pair(contrastive.dcl),
    "dclw": pair(contrastive.dclw),
    "dcl_one_way_reference": pair(contrastive.dcl_one_way),
    "sup_con": sup_con,
    "clip": pair(contrastive.clip),
    "siglip": pair(contrastive.siglip),
    "barlow_twins": pair(joint_embedding.barlow_twins),
    "vicreg": pair(joint_embedding.vicreg),
    "tico_first_step": tico,
    "negative_cosine": pair(joint_embedding.negative_cosine),
    "mmcr": mmcr,
    "koleo": lambda inputs, options: gradients("a", regularizers.koleo, inputs, options),
    "sinkhorn": lambda inputs, options: {"value": clustering.sinkhorn(inputs["scores"], **options)},
    "swav": swav,
    "dino_first_step": dino,
    "matryoshka_ce": matryoshka,
    "alignment": similarities,
    "relative_representation": lambda inputs, options: {
        "value": relative_representation(inputs["x"], inputs["anchors"])
    },
    "vq_ema": vq_ema,
    "fsq": fsq,
    "lfq": lfq,
    "bsq": bsq,
    "sim_vq": sim_vq,
    "rotation_trick": rotation_trick,
    "residual_vq": residual_vq,
}


def test_every_entry_has_a_line():
    assert sorted(TABLE) == ENTRIES
    assert META.keys() <= set(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_golden(entry):
    """Values to 2e-5, gradients to 1e-4 (of the largest entry of an array), indices exactly."""
    arrays = {
        key.removeprefix(f"{entry}/"): array
        for key, array in ARRAYS.items()
        if key.startswith(f"{entry}/")
    }
    inputs = {
        key.removeprefix("in/"): jnp.asarray(
            array.astype(np.int32) if array.dtype == int else array
        )
        for key, array in arrays.items()
        if key.startswith("in/")
    }
    # An entry without options stands in the file without a description.
    described = META[entry] if entry in META else {}
    options = {key: value for key, value in described.items() if key != "note"}
    results = TABLE[entry](inputs, options)
    expected = {key: array for key, array in arrays.items() if not key.startswith("in/")}
    assert set(results) == set(expected)
    for key, known in expected.items():
        found = np.asarray(results[key])
        if np.issubdtype(known.dtype, np.integer):
            np.testing.assert_array_equal(found, known, err_msg=key)
            continue
        tolerance = 1e-4 if key.startswith("grad") else 2e-5
        known = known.reshape(found.shape)
        assert np.max(np.abs(found - known)) <= tolerance * np.max(np.abs(known)), key
