"""Forward passes of several views: each view is encoded as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.data import augment
from repalign.models.convnet import ConvNet
from repalign.registry import UserError
from repalign.train.forward import supervised, two_views
from repalign.train.forward_views import views

IMAGES = jax.random.randint(jax.random.key(0), (4, 12, 12, 1), 0, 256).astype(jnp.uint8)
BATCH = {"image": IMAGES, "label": jnp.zeros((4,), jnp.int32), "teacher/tokens": jnp.ones((4, 2))}
MODEL = ConvNet((4, 8), groups=2, taps=(1,))
LARGE = {"crop_scale": (0.3, 1.0), "blur": 0.0}
SMALL = {**LARGE, "size": 6}
GROUPS = ({"count": 2, **LARGE}, {"count": 3, **SMALL})
KEY = jax.random.key(1)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick(function, *arguments):
    return jax.jit(function, compiler_options=QUICK)(*arguments)


@pytest.fixture(scope="module")
def everything():
    made = views(
        MODEL,
        groups=GROUPS,
        head_features=5,
        head_hidden=16,
        predictor_hidden=7,
        momentum=True,
        maps={"map": 3, "stage_1": 2},
    )

    def init_and_apply(key):
        params, state = made.init(jax.random.key(0), BATCH)
        average = jax.tree.map(lambda leaf: 1.5 * leaf, params)
        features, _ = made.apply(params, BATCH, key, average=average, frozen=None, state=state)
        return params, average, features

    return made, *quick(init_and_apply, KEY)


def test_features(everything):
    _, params, _, features = everything
    assert set(params) == {"encoder", "head", "predictor", "projector_map", "projector_stage_1"}
    shapes = {name: value.shape for name, value in features.items()}
    expected = {"teacher/tokens": (4, 2), "views/target": (4, 2, 5)}
    for name, dim in {"encoder": 8, "embedding": 5, "prediction": 5}.items():
        expected[f"views/{name}"] = (4, 5, dim)
        expected |= {f"view_{view}/{name}": (4, dim) for view in range(5)}
    for view in range(5):
        # The large views have the images' 12 pixels, the small ones 6.
        side = 6 if view < 2 else 3
        expected[f"view_{view}/stage_1"] = (4, side, side, 2)
        expected[f"view_{view}/map"] = (4, -(-side // 2), -(-side // 2), 3)
    expected |= {f"view_{view}/target": (4, 5) for view in range(2)}
    assert shapes == expected
    for name in ("encoder", "embedding", "prediction", "target"):
        stacked = features[f"views/{name}"]
        for view in range(stacked.shape[1]):
            np.testing.assert_array_equal(features[f"view_{view}/{name}"], stacked[:, view])


def test_each_view_is_encoded_as_if_it_were_alone(everything):
    made, params, average, features = everything
    recipes = [augment.ViewRecipe(**fields) for fields in (LARGE, LARGE, SMALL, SMALL, SMALL)]

    def alone(keys):
        codes = []
        for recipe, key in zip(recipes, keys, strict=True):
            view = recipe(key, IMAGES / 255.0)
            code, taps = made.encode(params, {}, view)
            target = made.encode(average, {}, view)[1]["projection"]
            codes.append((code, taps["projection"], target))
        return codes

    for view, (code, projection, target) in enumerate(quick(alone, jax.random.split(KEY, 5))):
        np.testing.assert_allclose(features[f"view_{view}/encoder"], code, atol=1e-5)
        np.testing.assert_allclose(features[f"view_{view}/embedding"], projection, atol=1e-5)
        assert view == 0 or np.abs(code - features["view_0/encoder"]).max() > 1e-2
        if view < 2:
            np.testing.assert_allclose(features[f"view_{view}/target"], target, atol=1e-4)


def test_a_projected_map_is_normalised_over_images_and_positions(everything):
    _, params, _, features = everything
    # The two large views pass together.
    both = np.stack([features["view_0/stage_1"], features["view_1/stage_1"]]).reshape(-1, 2)
    np.testing.assert_allclose(both.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(both.std(axis=0), 1.0, atol=1e-3)
    assert np.all(params["projector_map"]["linear_2"]["kernel"] == 0)


def test_two_views_are_two_of_several():
    fields = {"head_layers": 1, "head_features": 3}
    passes = (
        two_views(MODEL, view=LARGE, **fields),
        views(MODEL, groups=({"count": 2, **LARGE},), **fields),
        two_views(MODEL, view=LARGE, second_view=SMALL, **fields),
    )

    def features(made):
        params, state = made.init(jax.random.key(0), BATCH)
        assert set(params["head"]) == {"linear_1"}
        return made.apply(params, BATCH, KEY, average=None, frozen=None, state=state)[0]

    one, other, two_sizes = quick(lambda: [features(made) for made in passes])
    jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_allclose(two_sizes["view_0/embedding"], one["view_0/embedding"], atol=1e-5)
    assert np.abs(two_sizes["view_1/embedding"] - one["view_1/embedding"]).max() > 1e-3


def test_without_a_head_the_embedding_is_the_encoders():
    made = two_views(MODEL, view=LARGE, head_layers=0, predictor_hidden=7)

    def init_and_apply():
        params, state = made.init(jax.random.key(0), BATCH)
        features, _ = made.apply(params, BATCH, KEY, average=None, frozen=None, state=state)
        return params, features, made.encode(params, state, IMAGES)[1]

    params, features, taps = quick(init_and_apply)
    assert set(params) == {"encoder", "predictor"} and set(taps) == {"map", "stage_1"}
    np.testing.assert_array_equal(features["view_1/embedding"], features["view_1/encoder"])
    assert features["view_1/prediction"].shape == (4, 8)


def test_the_taps_of_the_frozen_encoder_hold_what_the_head_makes_of_it():
    made = supervised(MODEL, classes=3)

    def init_and_encode():
        params, state = made.init(jax.random.key(0), BATCH)
        params["head"]["linear"]["kernel"] += jax.random.normal(jax.random.key(2), (8, 3))
        return params, *made.encode(params, state, IMAGES)

    params, code, taps = quick(init_and_encode)
    expected = code @ params["head"]["linear"]["kernel"]
    np.testing.assert_allclose(taps["projection"], expected, rtol=1e-5, atol=1e-6)
    assert code.shape == (4, 8) and np.any(code)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"config\.forward\.groups\[1\]: missing count"):
        views(MODEL, groups=({"count": 2}, {"size": 6}))
    with pytest.raises(UserError, match=r"groups\[0\]\.crop: no such key.*crop_scale"):
        views(MODEL, groups=({"count": 2, "crop": (0.2, 1.0)},))
    with pytest.raises(UserError, match="at least one view"):
        views(MODEL, groups=())
    wrong = views(MODEL, groups=GROUPS, maps={"stage_2": 4})
    with pytest.raises(UserError, match="unknown tap of the encoder 'stage_2'.*stage_1"):
        jax.eval_shape(wrong.init, KEY, BATCH)
    wrong = views(MODEL, groups=GROUPS, momentum=True)
    params, state = jax.eval_shape(wrong.init, KEY, BATCH)
    with pytest.raises(UserError, match="momentum needs averaged parameters"):
        jax.eval_shape(
            lambda params: wrong.apply(params, BATCH, KEY, average=None, frozen=None, state=state),
            params,
        )
