"""Import of the official SiT + REPA checkpoints (sihyun-yu/REPA@67f7145)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from repalign.models.heads import Projector
from repalign.models.position import sincos_2d
from repalign.models.sit import SiT
from repalign.models.transformer import DataFormat, heads_first
from repalign.typing import Array, Float, Integer, PyTree


class SiTWithProjectors(nn.Module):
    """A SiT and REPA's projectors on one of its blocks, as the official model has them.

    Attributes:
        sit: the backbone; ``block_<encoder_depth>`` must be one of its taps.
        encoder_depth: the block (from 1) whose output the projectors read, before any norm.
        projector_features: output widths, one for each teacher.
        projector_hidden: hidden width of every projector.
    """

    sit: SiT
    encoder_depth: int
    projector_features: tuple[int, ...]
    projector_hidden: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch _ _ _"],
        t: Float[Array, " batch"],
        y: Integer[Array, " batch"],
        *,
        data_format: DataFormat = "NHWC",
    ) -> tuple[Float[Array, "batch _ _ _"], dict[str, Array]]:
        """Returns the velocity, and the SiT's taps with ``projection_0``, ``projection_1``, ..."""
        out, taps = self.sit(x, t, y, data_format=data_format)
        student = taps[f"block_{self.encoder_depth}"]
        for number, features in enumerate(self.projector_features):
            name = f"projection_{number}"
            projector = Projector(features, self.projector_hidden, dtype=self.sit.dtype, name=name)
            taps = {**taps, name: projector(student)}
        return out, taps


def from_official_repa(
    params: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[SiTWithProjectors, PyTree]:
    """Builds the official model and its variables from a PyTorch state dict.

    Args:
        params: arrays under the official names (``blocks.0.attn.qkv.weight``, ...), in torch's
            layouts: linear [out, in], convolution [out, in, height, width].
        config: the constructor arguments of the official ``SiT``; ``input_size``, ``patch_size``,
            ``in_channels``, ``hidden_size``, ``encoder_depth``, ``depth``, ``num_heads``,
            ``mlp_ratio``, ``class_dropout_prob``, ``num_classes``, ``z_dims``, ``projector_dim``
            and ``qk_norm`` are read (the official defaults fill in), others ignored (the
            interpolant, ``path_type``, belongs to the loss and the samplers).

    Returns:
        The module and its variables: ``module.apply(variables, x, t, y, data_format="NCHW")``.

    Raises:
        ValueError: parameters missing, unexpected or of a wrong shape, each named; or a position
            table that is not the fixed sine-cosine table.
    """
    config = {**_OFFICIAL_DEFAULTS, **config}
    sit = SiT(
        image_size=config["input_size"],
        patch_size=config["patch_size"],
        channels=config["in_channels"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        classes=config["num_classes"],
        taps=(config["encoder_depth"],),
        qk_norm=config["qk_norm"],
    )
    module = SiTWithProjectors(
        sit, config["encoder_depth"], tuple(config["z_dims"]), config["projector_dim"]
    )
    names = _official_names(sit, len(config["z_dims"]))
    _check_names(params, {*names, _POSITIONS})
    _check_positions(np.asarray(params[_POSITIONS]), sit)

    values = {}
    for name, path in names.items():
        value = np.asarray(params[name], np.float32)
        if name == _LABELS and not config["class_dropout_prob"]:
            # Trained without label dropout: the official table has no null row, ours always has.
            value = np.concatenate([value, np.zeros_like(value[:1])])
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif path[-1] == "kernel":
            value = value.T
        if path[-2] == "qkv":
            value = heads_first(value, heads=sit.heads)
        values[path] = jnp.asarray(value)
    _check_shapes(names, values, module)
    return module, {"params": traverse_util.unflatten_dict(values)}


_POSITIONS = "pos_embed"
_LABELS = "y_embedder.embedding_table.weight"

_OFFICIAL_DEFAULTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "encoder_depth": 8,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "z_dims": (768,),
    "projector_dim": 2048,
    "qk_norm": False,
}


def _official_names(sit: SiT, projectors: int) -> dict[str, tuple[str, ...]]:
    """Maps every trainable parameter's official name to its path in our tree."""
    linears = {
        "x_embedder.proj": ("sit", "patch_embedding"),
        "t_embedder.mlp.0": ("sit", "time_1"),
        "t_embedder.mlp.2": ("sit", "time_2"),
        "final_layer.linear": ("sit", "final"),
        "final_layer.adaLN_modulation.1": ("sit", "final_modulation"),
    }
    norms = {}
    for block in range(sit.depth):
        official, path = f"blocks.{block}", ("sit", "blocks", f"block_{block + 1}")
        linears[f"{official}.attn.qkv"] = (*path, "attention", "qkv")
        linears[f"{official}.attn.proj"] = (*path, "attention", "proj")
        linears[f"{official}.mlp.fc1"] = (*path, "mlp", "fc1")
        linears[f"{official}.mlp.fc2"] = (*path, "mlp", "fc2")
        linears[f"{official}.adaLN_modulation.1"] = (*path, "modulation")
        if sit.qk_norm:
            norms[f"{official}.attn.q_norm"] = (*path, "attention", "q_norm")
            norms[f"{official}.attn.k_norm"] = (*path, "attention", "k_norm")
    for number in range(projectors):
        for layer in range(3):
            path = (f"projection_{number}", f"linear_{layer + 1}")
            linears[f"projectors.{number}.{2 * layer}"] = path
    names = {_LABELS: ("sit", "label_embedding", "embedding")}
    for group, weight in ((linears, "kernel"), (norms, "scale")):
        for official, path in group.items():
            names[f"{official}.weight"] = (*path, weight)
            names[f"{official}.bias"] = (*path, "bias")
    return names


def _check_names(params: Mapping[str, np.ndarray], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - set(params)), sorted(set(params) - expected)
    if missing or unexpected:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        raise ValueError(
            f"the parameters do not fit the config (depth, qk_norm, z_dims): {'; '.join(problems)}."
        )


def _check_positions(table: np.ndarray, sit: SiT) -> None:
    side = sit.image_size // sit.patch_size
    expected = sincos_2d(sit.width, (side, side))
    shape = (1, *expected.shape)
    if table.shape != shape or not np.allclose(table[0], expected, atol=1e-3):
        raise ValueError(
            f"{_POSITIONS} is not the fixed sine-cosine table of shape {shape}: "
            "this SiT has no learned position table."
        )


def _check_shapes(
    names: Mapping[str, tuple[str, ...]], values: Mapping[tuple[str, ...], Array], module: nn.Module
) -> None:
    sit = module.sit
    x = jax.ShapeDtypeStruct((1, sit.image_size, sit.image_size, sit.channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    y = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, y)["params"]
    expected = traverse_util.flatten_dict(shapes)
    wrong = [
        f"{name} (becomes {values[path].shape}, needs {expected[path].shape})"
        for name, path in names.items()
        if values[path].shape != expected[path].shape
    ]
    if wrong:
        raise ValueError(f"parameters of a wrong shape for this config: {', '.join(wrong)}.")
