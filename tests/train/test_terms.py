import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repalign.generation import flow
from repalign.losses import alignment, contrastive
from repalign.models.heads import Projector
from repalign.registry import UserError
from repalign.train.objective import Objective
from repalign.train.terms import flow_matching, from_config, loss, repa

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def features():
    keys = iter(jax.random.split(KEY, 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    return {
        "view_0/embedding": draw(4, 3),
        "view_1/embedding": draw(4, 3),
        "sit/block_8": draw(4, 2, 5),
        "teacher/patches": draw(4, 2, 3),
        "teacher/other": draw(4, 2, 7),
        "sit/output": draw(4, 2, 2, 1),
        "flow/data": draw(4, 2, 2, 1),
        "flow/noise": draw(4, 2, 2, 1),
        "flow/time": jnp.asarray([0.1, 0.4, 0.6, 0.9]),
    }


def value(terms, features):
    objective = Objective(tuple(terms))
    params, state = objective.init(KEY, features)
    return objective.apply(params, state, features, KEY, step=0)[0]


VIEWS = {"a": "view_0/embedding", "b": "view_1/embedding"}


def test_a_loss_is_a_term_given_its_path_or_itself(features):
    expected = contrastive.nt_xent(
        features["view_0/embedding"], features["view_1/embedding"], temperature=0.5
    ).mean()
    by_path = loss("losses.contrastive.nt_xent", **VIEWS, temperature=0.5)
    itself = loss(contrastive.nt_xent, name="mine", **VIEWS, temperature=0.5)
    assert (by_path.name, itself.name) == ("nt_xent", "mine")
    np.testing.assert_array_equal(value([by_path], features), expected)
    np.testing.assert_array_equal(value([itself], features), expected)


def test_a_loss_of_lists_of_arrays_reads_a_list_of_features(features):
    def distances(pairs, *, scale):
        return scale * jnp.sum(jnp.square(pairs[0] - pairs[1]), axis=-1)

    term = loss(distances, pairs=list(VIEWS.values()), scale=2.0)
    difference = features["view_0/embedding"] - features["view_1/embedding"]
    expected = 2.0 * jnp.square(difference).sum(-1).mean()
    np.testing.assert_allclose(value([term], features), expected, rtol=1e-6)


def test_mistakes_in_the_arguments_of_a_loss_name_the_key():
    with pytest.raises(UserError, match=r"objective\.nt_xent\.temprature: .*'temperature'"):
        loss("losses.contrastive.nt_xent", **VIEWS, temprature=0.5)
    with pytest.raises(UserError, match=r"objective\.nt_xent: missing b"):
        loss("losses.contrastive.nt_xent", a="view_0/embedding", temperature=0.5)
    with pytest.raises(UserError, match="'nt_xent'"):
        loss("losses.contrastive.nt_xnet", **VIEWS)


def test_the_flow_matching_term_is_the_loss_of_the_recorded_arrays(features):
    expected = flow.flow_matching_loss(
        features["sit/output"],
        features["flow/data"],
        features["flow/noise"],
        features["flow/time"],
        interpolant=flow.interpolant("linear"),
        prediction_type="velocity",
    ).mean()
    by_hand = jnp.square(features["sit/output"] - (features["flow/noise"] - features["flow/data"]))
    np.testing.assert_array_equal(value([flow_matching()], features), expected)
    np.testing.assert_allclose(expected, by_hand.mean(), rtol=1e-6)


def test_repa_projects_the_student_and_compares_it_with_each_teacher(features):
    both = ["teacher/patches", "teacher/other"]
    objective = Objective((repa(student="sit/block_8", teacher=both, projector_width=8),))
    params, state = objective.init(KEY, features)
    shapes = jax.tree.map(jnp.shape, params["repa"])
    widths = [
        [layer["kernel"] for layer in shapes[f"projector_{index}"].values()] for index in (0, 1)
    ]
    assert widths == [[(5, 8), (8, 8), (8, 3)], [(5, 8), (8, 8), (8, 7)]]

    def term(params, features):
        return objective.apply(params, state, features, KEY, step=0)[0]

    projections = [
        Projector(hidden=8, features=dim).apply(
            {"params": params["repa"][f"projector_{index}"]}, features["sit/block_8"]
        )
        for index, dim in enumerate((3, 7))
    ]
    teachers = [features["teacher/patches"], features["teacher/other"]]
    expected = alignment.repa(projections, teachers).mean()
    np.testing.assert_allclose(term(params, features), expected, rtol=1e-6)
    gradient, feature_gradient = jax.grad(term, argnums=(0, 1))(params, features)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)
    assert np.any(feature_gradient["sit/block_8"] != 0)


def test_the_gradient_of_repa_agrees_with_a_finite_difference(features):
    align = repa(student="sit/block_8", teacher="teacher/patches", projector_width=8)
    objective = Objective((align,))
    params, state = objective.init(KEY, features)

    def term(student):
        new = {**features, "sit/block_8": student}
        return objective.apply(params, state, new, KEY, step=0)[0]

    student = features["sit/block_8"]
    direction = jax.random.normal(jax.random.key(1), student.shape)
    slope = jnp.vdot(jax.grad(term)(student), direction)
    step = 1e-2
    numeric = (term(student + step * direction) - term(student - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2, atol=1e-4)


def test_the_sample_objective_of_the_module_runs(features):
    objective = flow_matching() + 0.5 * repa(
        student="sit/block_8", teacher="teacher/patches", projector_width=8
    )
    params, state = objective.init(KEY, features)
    (total, output), gradients = jax.value_and_grad(objective.apply, has_aux=True)(
        params, state, features, KEY, step=0
    )
    parts = output.metrics
    np.testing.assert_allclose(total, parts["flow_matching"] + 0.5 * parts["repa"], rtol=1e-6)
    assert gradients["flow_matching"] == {} and set(gradients["repa"]) == {"projector_0"}


def test_a_config_section_gives_the_terms_with_their_weights(features):
    contrast = {"term": "losses.contrastive.nt_xent", **VIEWS, "temperature": 0.5}
    section = {
        "contrast": {**contrast, "weight": 2.0},
        "align": {
            "term": "train.terms.repa",
            "student": "sit/block_8",
            "teacher": "teacher/patches",
            "projector_width": 8,
        },
    }
    terms = from_config(section)
    assert [(term.name, term.weight) for term in terms] == [("contrast", 2.0), ("align", 1.0)]
    plain = loss("losses.contrastive.nt_xent", **VIEWS, temperature=0.5)
    expected = 2.0 * value([plain], features)
    np.testing.assert_allclose(value(terms[:1], features), expected, rtol=1e-6)
    assert section["contrast"]["weight"] == 2.0  # the section itself is left as it was


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"a": "view_0/embedding"}, r"objective\.wrong: missing the key 'term'"),
        (
            {"term": "train.terms.repa", "student": "a", "teacher": "b", "projecter_width": 8},
            r"objective\.wrong\.projecter_width: .*'projector_width'",
        ),
        ({"term": "losses.contrastive.nt_xent", **VIEWS, "tau": 1.0}, r"objective\.wrong\.tau"),
        ({"term": "losses.contrastiv.nt_xent"}, "no module 'repalign.losses.contrastiv'"),
        ({"term": "train.terms.repa", "student": "a"}, r"objective\.wrong: missing teacher"),
        (
            {"term": "losses.contrastive.nt_xent", **VIEWS, "temperature": 1.0, "weight": "2"},
            r"objective\.wrong\.weight must be a number",
        ),
    ],
)
def test_mistakes_in_a_config_section_name_the_place(entry, message):
    with pytest.raises(UserError, match=message):
        from_config({"wrong": entry})


def test_every_term_constructor_takes_a_name():
    for constructor in (flow_matching, repa):
        assert "name" in inspect.signature(constructor).parameters
