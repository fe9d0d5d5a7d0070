"""The table of loss cases: what a case says of a loss, and how one is entered."""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 8
_RANDOM = np.random.default_rng(11)
QUEUE = _RANDOM.normal(size=(12, WIDTH)).astype(np.float32)
PROTOTYPES = _RANDOM.normal(size=(5, WIDTH)).astype(np.float32)
WEIGHTS = (_RANDOM.normal(size=(3, WIDTH, WIDTH)) / 8).astype(np.float32)
SPREAD = (np.eye(WIDTH) + 0.1).astype(np.float32)
MIXED = np.stack([np.arange(WIDTH), *(_RANDOM.permutation(WIDTH) for _ in range(2))])


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss to test.

    Attributes:
        of: the public function.
        call: the function of (a, b, ids, where).
        cross: whether examples act on each other.
        scale: what may be scaled without a change: ``rows``, the ``whole`` of a or b, or nothing.
        rotation: whether rotating a and b alike changes nothing.
        permutes: whether a permutation of the batch permutes the values (false for those that draw
            random numbers for each example, or pair it with its neighbour in the batch).
        fixed: the arguments that receive no gradient.
        stops: whether part of what depends on a free argument is held constant, so that the
            gradient is not the derivative of the value.
    """

    of: Callable
    call: Callable
    cross: bool = True
    scale: str = ""
    rotation: bool = False
    permutes: bool = True
    fixed: str = ""
    stops: bool = False

    @property
    def masks(self) -> bool:
        """Whether the loss leaves out masked examples."""
        return "where" in inspect.signature(self.of).parameters


def key():
    return jax.random.key(8)


def views(a, b):
    """Three views, each as long as its source and turned with it."""
    return jnp.stack([a, b, -a], axis=1)


def tokens(x):
    """Three tokens of an example: its entries in three orders, exact in every type."""
    return jnp.stack([x[:, order] for order in MIXED], axis=1)


def heads(x):
    return tokens(x)[:, None]


def labels(ids):
    return ids % 3


def token_mask(x, where):
    """Hides the middle token of every example, and all of the masked ones."""
    mask = jnp.asarray([True, False, True]) & jnp.ones((len(x), 1), bool)
    return mask if where is None else mask & where[:, None]


def both(terms):
    return terms[0] + 0.1 * terms[1]


def critic(x, y):
    return jnp.sum(jnp.tanh(x) * y)


def scores(x):
    return jnp.sum(jnp.square(x), axis=1) + jnp.sum(x[:, :-1] * x[:, 1:], axis=1)


def decided(x):
    """The type that a loss of ``x`` decides in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def queue(x):
    return jnp.asarray(QUEUE, decided(x))


def positives(ids):
    return labels(ids)[:, None] == labels(ids)[None, :]


NORMALISED = {"scale": "rows", "rotation": True}
ALONE = {"cross": False}
HOT = {"temperature": 0.2}

CASES: dict[str, Case] = {}


def case(name, of, call, **claims):
    CASES[name] = Case(of, call, **claims)


def plain(name, of, *, options=None, **claims):
    """A loss of two arrays, with ``where`` if it takes one."""
    options = options or {}
    masks = "where" in inspect.signature(of).parameters

    def call(a, b, ids, where):
        return of(a, b, **options, **({"where": where} if masks else {}))

    case(name, of, call, **claims)


def one(name, of, **claims):
    """A loss of one array."""
    case(name, of, lambda a, b, ids, where: of(a, where=where), fixed="b", **claims)
