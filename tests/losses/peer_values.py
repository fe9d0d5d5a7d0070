"""What other libraries compute on fixed inputs: writes peer_values.npz, or checks it.

Run in an environment that has the peers (torch for the CPU is enough); jax and this package are not
needed::

    pip install lightly pytorch-metric-learning open_clip_torch sentence-transformers
    python tests/losses/peer_values.py --check

``test_peers.py`` compares our losses with the stored numbers. Keys are ``in/ARG`` for the inputs
that all cases share, ``NAME/value`` and ``NAME/grad/ARG``; ``meta`` holds the peers' versions.
"""

import argparse
import importlib.metadata
import json
import pathlib
import types

import numpy as np
import torch
from lightly import loss as lightly
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from open_clip.loss import ClipLoss, SigLipLoss
from pytorch_metric_learning import distances, losses, reducers
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as sentence
from torch import nn
from torch.nn import functional

STORED = pathlib.Path(__file__).parent / "peer_values.npz"
PEERS = ("lightly", "pytorch-metric-learning", "open_clip_torch", "sentence-transformers")
ROWS, WIDTH, TOKENS, PROTOTYPES = 16, 6, 5, 7


def draw():
    """Returns the inputs of all cases, by name."""
    generator = np.random.default_rng(2024)
    shapes = {name: (ROWS, WIDTH) for name in ("a", "b", "c", "d")}
    shapes |= {name: (ROWS, PROTOTYPES) for name in ("s0", "s1", "s2", "t0", "t1")}
    shapes |= {name: (ROWS, TOKENS, WIDTH) for name in ("patches", "other_patches")}
    shapes |= {"queue": (9, WIDTH), "prototypes": (PROTOTYPES, WIDTH), "directions": (11, WIDTH)}
    inputs = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    inputs["b"] = inputs["a"] + 0.5 * inputs["b"]  # what has pairs is paired
    inputs["directions"] /= np.linalg.norm(inputs["directions"], axis=1, keepdims=True)
    inputs |= {"logit_scale": np.asarray(2.0), "bias": np.asarray(-3.0)}
    inputs["labels"] = np.arange(ROWS) % 5
    inputs["masked"] = generator.random((ROWS, TOKENS)) < 0.6
    return {
        name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in inputs.items()
    }


def with_state(loss, first, second):
    """A loss's second call, whose state comes from the first."""
    with torch.no_grad():
        loss(*first)
    return loss(*second)


def memory_bank(a, b, queue):
    loss = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(len(queue), WIDTH))
    loss.memory_bank.bank = functional.normalize(queue, dim=1)
    loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    return loss(a, b)


def without_randomness(loss, directions):
    loss._generate_unit_vectors = lambda *_: directions.T
    return loss


def lejepa(a, b, directions):
    views = torch.stack([a, b])
    regularizer = without_randomness(lightly.SIGReg(num_vectors=len(directions)), directions)
    return 0.7 * lejepa_invariance_loss(all_proj=views, global_proj=views) + 0.3 * regularizer(
        views
    )


class Embeddings(nn.Module):
    """A sentence transformer whose sentences are their embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["x"]}

    def get_embedding_dimension(self):
        return WIDTH


class Layers(Transformer):
    """A transformer whose layers' outputs are given."""

    def __init__(self):
        nn.Module.__init__(self)
        config = types.SimpleNamespace(output_hidden_states=False)
        object.__setattr__(self, "given", types.SimpleNamespace(config=config))

    auto_model = property(lambda self: self.given)

    def forward(self, features):
        features["all_layer_embeddings"] = features["layers"]
        return features | {"token_embeddings": features["layers"][-1]}


class Deep(BaseModel):
    """A sentence transformer of such layers."""

    def __init__(self):
        nn.Module.__init__(self)
        self.layers = Layers()

    def __getitem__(self, index):
        return self.layers

    def forward(self, features):
        return {"sentence_embedding": self.layers(features)["token_embeddings"]}

    def get_embedding_dimension(self):
        return WIDTH

    def _load_default_modules(self, *_, **__):
        return [self.layers], {}


def columns(*embeddings):
    return [{"x": x} for x in embeddings]


def ranking(model=None, **options):
    return sentence.MultipleNegativesRankingLoss(model or Embeddings(), scale=5.0, **options)


def nested(a, b):
    model = Embeddings()
    loss = sentence.MatryoshkaLoss(
        model, ranking(model), [WIDTH, 4, 2], matryoshka_weights=[1.0, 0.5, 0.25]
    )
    return loss(columns(a, b), None)


def two_dimensional(a, b, c, d, *, temperature):
    """Shallow layers a and c, last layers b and d, of two columns of sentences."""
    model = Deep()
    loss = sentence.Matryoshka2dLoss(
        model,
        ranking(model),
        [WIDTH, 3],
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        kl_temperature=temperature,
        layer_weighting="linear",
    )
    return loss([{"layers": [a, b]}, {"layers": [c, d]}], None)


def triplets(a, b, c):
    index = torch.arange(ROWS)
    loss = losses.TripletMarginLoss(
        margin=0.5,
        distance=distances.LpDistance(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )
    return loss(torch.cat([a, b, c]), indices_tuple=(index, index + ROWS, index + 2 * ROWS))


def unit(x):
    return functional.normalize(x, dim=-1)


# Name: (arguments that get a gradient, the others, the peer's value).
CASES = {
    "lightly/nt_xent": ("a b", "", lightly.NTXentLoss(temperature=0.2)),
    "lightly/nt_xent_memory_bank": ("a b", "queue", memory_bank),
    "lightly/dcl": ("a b", "", lightly.DCLLoss(temperature=0.2)),
    "lightly/dclw": ("a b", "", lightly.DCLWLoss(temperature=0.2, sigma=0.5)),
    "lightly/barlow_twins": ("a b", "", lightly.BarlowTwinsLoss(lambda_param=0.02)),
    "lightly/vicreg": ("a b", "", lightly.VICRegLoss(lambda_param=20.0, mu_param=15.0)),
    "lightly/negative_cosine": ("a b", "", lightly.NegativeCosineSimilarity()),
    "lightly/tico": (
        "a b",
        "c d",
        lambda a, b, c, d: with_state(lightly.TiCoLoss(beta=0.8, rho=5.0), (c, d), (a, b)),
    ),
    "lightly/mmcr": (
        "a b",
        "",
        lambda a, b: lightly.MMCRLoss(lmda=0.1)(
            torch.stack([unit(a), unit(b)], 1), torch.stack([unit(b), unit(a)], 1)
        ),
    ),
    "lightly/koleo": ("a", "", lightly.KoLeoLoss()),
    "lightly/swav": (
        "s0 s1 s2",
        "",
        lambda s0, s1, s2: lightly.SwaVLoss(sinkhorn_epsilon=0.3)([s0, s1], [s2]),
    ),
    "lightly/swav_queue": (
        "s0 s1",
        "t0 t1",
        lambda s0, s1, t0, t1: lightly.SwaVLoss(sinkhorn_epsilon=0.3)([s0, s1], [], [t0, t1]),
    ),
    "lightly/dino": (
        "s0 s1 s2",
        "t0 t1",
        lambda s0, s1, s2, t0, t1: with_state(
            lightly.DINOLoss(output_dim=PROTOTYPES, warmup_teacher_temp=0.5, teacher_temp=0.5),
            ([t1, t0], [s1, s2]),
            ([t0, t1], [s0, s1, s2]),
        ),
    ),
    "lightly/ibot": (
        "patches",
        "other_patches masked",
        lambda patches, other_patches, masked: lightly.IBOTPatchLoss(
            output_dim=WIDTH, teacher_temp=0.3
        )(other_patches[masked], patches[masked], masked[:, None]),
    ),
    "lightly/msn": (
        "a prototypes",
        "b",
        lambda a, prototypes, b: lightly.MSNLoss(sinkhorn_iterations=0)(a, b, prototypes),
    ),
    "lightly/msn_sinkhorn": (
        "a prototypes",
        "b",
        lambda a, prototypes, b: lightly.MSNLoss(sinkhorn_iterations=3)(a, b, prototypes),
    ),
    "lightly/capi": (
        "patches",
        "other_patches",
        lambda patches, other_patches: lightly.CAPILoss(teacher_temperature=0.4)(
            other_patches, patches
        ),
    ),
    "lightly/emp_ssl": ("a b", "", lambda a, b: lightly.EMPSSLLoss()([unit(a), unit(b)])),
    "lightly/frossl": (
        "a b",
        "",
        lambda a, b: lightly.FroSSLLoss()([a - a.mean(0), b - b.mean(0)]),
    ),
    "lightly/w_mse": (
        "a b",
        "",
        lambda a, b: lightly.WMSELoss(
            embedding_dim=WIDTH, eps=1e-3, w_size=ROWS, track_running_stats=False
        )(torch.cat([a, b])),
    ),
    "lightly/sigreg": (
        "a",
        "directions",
        lambda a, directions: without_randomness(
            lightly.SIGReg(num_vectors=len(directions)), directions
        )(a),
    ),
    "lightly/lejepa": ("a b", "directions", lejepa),
    "lightly/patch_kernel_alignment": (
        "patches",
        "other_patches",
        lightly.PatchKernelAlignmentLoss(),
    ),
    "pytorch-metric-learning/sup_con": (
        "a",
        "labels",
        losses.SupConLoss(temperature=0.2),
    ),
    "pytorch-metric-learning/nt_xent": (
        "a b",
        "",
        lambda a, b: losses.NTXentLoss(temperature=0.2)(
            torch.cat([a, b]), torch.arange(ROWS).repeat(2)
        ),
    ),
    "pytorch-metric-learning/triplet": ("a b c", "", triplets),
    "pytorch-metric-learning/vicreg": (
        "a b",
        "",
        lambda a, b: losses.VICRegLoss(invariance_lambda=20, variance_mu=15)(a, ref_emb=b),
    ),
    "open_clip_torch/clip": (
        "a b logit_scale",
        "",
        lambda a, b, logit_scale: ClipLoss()(unit(a), unit(b), logit_scale.exp()),
    ),
    "open_clip_torch/siglip": (
        "a b logit_scale bias",
        "",
        lambda a, b, logit_scale, bias: SigLipLoss()(unit(a), unit(b), logit_scale.exp(), bias),
    ),
    "sentence-transformers/multiple_negatives_ranking": (
        "a b",
        "",
        lambda a, b: ranking()(columns(a, b), None),
    ),
    "sentence-transformers/symmetric_ranking": (
        "a b",
        "",
        lambda a, b: ranking(
            directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )(columns(a, b), None),
    ),
    "sentence-transformers/triplet": (
        "a b c",
        "",
        lambda a, b, c: sentence.TripletLoss(Embeddings(), triplet_margin=0.5)(
            columns(a, b, c), None
        ),
    ),
    "sentence-transformers/matryoshka": ("a b", "", nested),
    "sentence-transformers/matryoshka_2d": (
        "a b c d",
        "",
        lambda a, b, c, d: two_dimensional(a, b, c, d, temperature=0.0),
    ),
    "sentence-transformers/matryoshka_2d_divergence": (
        "a c",
        "b d",
        lambda a, c, b, d: two_dimensional(a, b, c, d, temperature=0.3),
    ),
}


def compute():
    """Returns what is stored: float64 arithmetic on the float32 inputs."""
    torch.set_default_dtype(torch.float64)
    inputs = draw()
    versions = {peer: importlib.metadata.version(peer) for peer in (*PEERS, "torch")}
    arrays = {f"in/{name}": array for name, array in inputs.items()}
    for name, (free, others, peer) in CASES.items():
        tensors = {key: torch.tensor(array) for key, array in inputs.items()}
        tensors = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
        names = free.split()
        free = [tensors[key].requires_grad_() for key in names]
        value = peer(*free, *(tensors[key] for key in others.split())).squeeze()
        arrays[f"{name}/value"] = value.detach().numpy()
        for key, gradient in zip(names, torch.autograd.grad(value, free), strict=True):
            arrays[f"{name}/grad/{key}"] = gradient.numpy()
    arrays = {k: x.astype(np.float32) if x.dtype == np.float64 else x for k, x in arrays.items()}
    return arrays | {"meta": np.asarray(json.dumps(versions))}


def check(found):
    """Fails where the installed peers no longer give what is stored."""
    with np.load(STORED) as archive:
        stored = dict(archive)
    print("stored:", stored.pop("meta"), "\nfound: ", found.pop("meta"))
    assert stored.keys() == found.keys(), stored.keys() ^ found.keys()
    for key, known in stored.items():
        np.testing.assert_allclose(found[key], known, rtol=1e-4, atol=1e-5, err_msg=key)
    print(f"{len(stored)} arrays are what is stored")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        check(compute())
    else:
        np.savez_compressed(STORED, **compute())
