"""Masked prediction on 8 devices: assignments are balanced over the whole batch, tokens are picked
where their example lies; value and gradient are those of one device.
"""

import json

import pytest
import simulated_devices

SCRIPT = """
import collections, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from repalign.models.vit import ViT
from repalign.train.forward_masked import latent_prediction, masked_autoencoder
from repalign.train.masked_terms import capi, mimic

vit = ViT(image_size=16, patch_size=4, width=16, depth=1, heads=2, class_token=False,
          position="sincos")
view = {"crop_scale": None, "flip": 0.0}
rng = np.random.default_rng(0)
batch = {"image": rng.integers(0, 256, (16, 16, 16, 1)).astype(np.uint8),
         "teacher/tokens": rng.normal(size=(16, 16, 3)).astype(np.float32)}
made = {
    "capi": (latent_prediction(vit, view=view, predicted=0.5, predictor_depth=1,
                               predictor_heads=2),
             capi(teacher="teacher/patches", student="predictor/patches",
                  positions="predictor/positions", clusters=8)),
    "mimic": (masked_autoencoder(vit, view=view, decoder_width=8, decoder_depth=1,
                                 decoder_heads=2),
              mimic(student="encoder/patches", teacher="teacher/tokens",
                    positions="mae/visible")),
}
report = {}
for name, (forward, term) in made.items():
    model, _ = forward.init(jax.random.key(0), batch)
    def run(params, batch):
        key = jax.random.key(1)
        features, _ = forward.apply(params["model"], batch, key, average=model, frozen=None,
                                    state={})
        if "term" not in params:
            return features
        return jnp.mean(term.apply(params["term"], {}, features, key).loss)
    head, _ = term.init(jax.random.key(2), run({"model": model}, batch))
    params = {"model": model, "term": head}
    step = jax.value_and_grad(run)
    alone = jax.jit(step)(params, batch)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
            placed = jax.device_put(params, copies), jax.device_put(batch, rows)
            compiled = jax.jit(step).lower(*placed).compile()
            together = compiled(*placed)
        def error(found, expected):
            expected = np.asarray(expected)
            scale = max(np.abs(expected).max(), 1e-3)
            return float(np.abs(np.asarray(found) - expected).max() / scale)
        errors = jax.tree.leaves(jax.tree.map(error, together, alone))
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        found = collections.Counter(re.findall(f" ({kinds})(?:-start)?\\\\(", compiled.as_text()))
        report[f"{name} {kind.name}"] = [max(errors), len(errors), dict(found)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report():
    return json.loads(simulated_devices.output("-c", SCRIPT, optimize=False))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["capi", "mimic"])
def test_value_and_gradient_are_those_of_one_device(report, name, kind):
    error, leaves, collectives = report[f"{name} {kind}"]
    assert error < 1e-4 and leaves > 15
    # Sums over the batch alone: no token and no image leaves its device.
    assert collectives.keys() == {"all-reduce"}
