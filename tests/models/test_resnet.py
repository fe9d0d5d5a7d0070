"""ResNet: parameters and outputs of torchvision's, batch statistics as state."""

import re

import formula_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.models.resnet import SIZES, BatchNorm, ResNet
from repalign.registry import UserError

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def shapes(size, **fields):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(ResNet(**SIZES[size], **fields).init, jax.random.key(0), image)


@pytest.mark.parametrize(
    ("size", "parameters", "features"),
    # torchvision's counts, with the classifier of 1,000 classes.
    [
        ("18", 11_689_512, 512),
        ("34", 21_797_672, 512),
        ("50", 25_557_032, 2048),
        ("101", 44_549_160, 2048),
        ("152", 60_192_808, 2048),
    ],
)
def test_parameters_are_the_published_ones(size, parameters, features):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(size)["params"]))
    assert count + 1000 * features + 1000 == parameters


def test_the_cifar_stem_keeps_the_resolution():
    variables = shapes("18", stem="cifar")
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 64)
    module = ResNet(**SIZES["18"], stem="cifar", taps=(1, 4), dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    out, taps = jax.eval_shape(module.apply, variables, image)
    assert (out.shape, out.dtype) == ((2, 512), jnp.float32)
    found = {name: tap.shape for name, tap in taps.items()}
    assert found == {
        "stage_1": (2, 32, 32, 64),
        "stage_4": (2, 4, 4, 512),
        "map": (2, 4, 4, 512),
    }


def torchvision_name(path):
    *layers, leaf = path
    names = {"stem_conv": "conv1", "stem_norm": "bn1"}
    if len(layers) == 1:
        return f"{names[layers[0]]}.{formula_weights.LEAVES[leaf]}"
    stage, block = re.fullmatch(r"stage_(\d)_block_(\d)", layers[0]).groups()
    layer = layers[1].replace("conv_", "conv").replace("norm_", "bn")
    layer = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}.get(layer) or layer
    return f"layer{stage}.{int(block) - 1}.{layer}.{formula_weights.LEAVES[leaf]}"


# torchvision 0.29.2, ResNet(Bottleneck, [2, 1, 1, 1]) without its classifier, filled by the
# formula, on image((2, 64, 64, 3)).
EVALUATED = [
    [371.2437, 255.335, 46.33889, 0],
    [608.0519, 393.6379, 56.04798, 0],
]
TRAINED = [
    [0.8569045, 1.158168, 1.190147, 1.003719],
    [0.02380608, 0, 0, 0.0754202],
]
RUNNING_MEANS = {
    "stem_norm": [0.07116838, 0.08978401, 0.06659127, 0.01156242],
    "stage_2_block_1/shortcut_norm": [-0.04776559, -0.05030548, -0.06870165, -0.1274218],
    "stage_4_block_1/norm_3": [0.1614388, 0.2759452, 0.3550922, 0.3769396],
}


def test_outputs_and_statistics_are_torchvisions():
    module = ResNet((2, 1, 1, 1))
    x = jnp.asarray(formula_weights.image((2, 64, 64, 3)))
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = {
        name: formula_weights.filled(abstract[name], torchvision_name)
        for name in ("params", "batch_stats")
    }

    @jax.jit
    def both(variables, x):
        evaluated, _ = module.apply(variables, x)
        (trained, _), new = module.apply(variables, x, mutable=["batch_stats"])
        return evaluated, trained, new["batch_stats"]

    evaluated, trained, new = both.lower(variables, x).compile(compiler_options=QUICK)(variables, x)
    np.testing.assert_allclose(evaluated[:, 5::512], EVALUATED, rtol=2e-5, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(evaluated), 35927.223, rtol=2e-5)
    np.testing.assert_allclose(trained[:, 5::512], TRAINED, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(trained), 48.482151, rtol=2e-5)
    for path, expected in RUNNING_MEANS.items():
        found = new
        for key in path.split("/"):
            found = found[key]
        np.testing.assert_allclose(found["mean"][:4], expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_takes_the_batch_or_the_running_statistics():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (64, 4, 4, 5))
    module = BatchNorm(momentum=0.75)
    variables = module.init(jax.random.key(1), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(5))
    out, new = module.apply(variables, x, mutable=["batch_stats"])
    axes = (0, 1, 2)
    np.testing.assert_allclose(out, (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5), atol=1e-5)
    running = new["batch_stats"]
    np.testing.assert_allclose(running["mean"], 0.25 * x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.75 + 0.25 * x.var(axes), rtol=1e-5)
    frozen = module.apply({"params": variables["params"], **new}, x)
    expected = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    np.testing.assert_allclose(frozen, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(frozen[:1], module.apply({**variables, **new}, x[:1]), rtol=1e-5)


@pytest.mark.parametrize("zero_scale", [True, False])
def test_a_block_starts_at_its_shortcut(zero_scale):
    module = ResNet((1,), width=8, stem="cifar", zero_scale=zero_scale)
    init = jax.jit(module.init, compiler_options=QUICK)
    block = init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]["stage_1_block_1"]
    assert block["norm_3"]["scale"].any() != zero_scale
    assert block["norm_2"]["scale"].all() and block["shortcut_norm"]["scale"].all()


def test_wrong_names_say_what_is_right():
    x = jnp.ones((1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"taps \[2\] are no stages of 1..1"):
        ResNet((1,), taps=(2,)).init(jax.random.key(0), x)
    with pytest.raises(UserError, match="unknown stem 'cifr'. Did you mean 'cifar'"):
        ResNet((1,), stem="cifr").init(jax.random.key(0), x)
