"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193): weights in and out, and REPA's frozen teacher.

The weights are Meta's (Apache-2.0) and are not part of this package: `dinov2_teacher` reads a file
that was downloaded beforehand.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jaxtyping import Shaped

from repalign.models.position import bicubic_matrix
from repalign.models.transformer import heads_first, heads_second, stack_blocks, unstack_blocks
from repalign.models.vit import ENCODERS, ViT
from repalign.pretrained.torch_file import read_torch_state_dict
from repalign.registry import UserError, lookup
from repalign.typing import Array, Float, PyTree, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

StateDict = Mapping[str, Shaped[np.ndarray, "..."]]

_URL = "https://dl.fbaipublicfiles.com/dinov2"
_FILES = {
    "dinov2_s": ("dinov2_vits14", "dinov2_vits14", "facebook/dinov2-small"),
    "dinov2_b": ("dinov2_vitb14", "dinov2_vitb14", "facebook/dinov2-base"),
    "dinov2_l": ("dinov2_vitl14", "dinov2_vitl14", "facebook/dinov2-large"),
    "dinov2_b_registers": (
        "dinov2_vitb14",
        "dinov2_vitb14_reg4",
        "facebook/dinov2-with-registers-base",
    ),
}
"""By architecture: the folder and the file of the official weights, and their Hugging Face name."""


class Teacher(NamedTuple):
    """A frozen encoder that runs inside a train step.

    Attributes:
        apply: ``(params, images uint8 [batch, height, width, 3]) -> patches [batch, tokens, dim]``.
        shapes: returns the shapes of the parameters and reads no file.
        load: returns the parameters.
    """

    apply: Callable[[PyTree, Array], Array]
    shapes: Callable[[], PyTree]
    load: Callable[[], PyTree]


def dinov2_teacher(
    *,
    architecture: str = "dinov2_b",
    weights: str = "",
    image_size: int = 224,
    dtype: str = "float32",
) -> Teacher:
    """Returns DINOv2 as REPA runs it: normalised patch tokens of the resized, unaugmented image.

    Source: sihyun-yu/REPA@67f7145:train.py:36-52 (see `preprocess`) and utils.py:90-100: the
    position table is resampled to the image's grid by timm's antialiased bicubic interpolation and
    not by DINOv2's own. The class token and the registers are left out.

    Args:
        architecture: ``dinov2_s``, ``dinov2_b``, ``dinov2_l`` or ``dinov2_b_registers``.
        weights: a downloaded file; read by ``load`` only (see `read_weights`).
        image_size: side to which images are resized; 224 gives 16 x 16 tokens, as many as a SiT
            with patches of 2 has at 256 pixels.
        dtype: of the computation.

    Raises:
        UserError: no such architecture; from ``load``: no such file, or one of another network.
    """
    lookup(_FILES, architecture, kind="DINOv2 architecture")
    model = ViT(
        **{**ENCODERS[architecture], "position_resize": "bicubic_antialias"},
        scan=True,
        dtype=jnp.dtype(dtype),
    )

    def apply(params: PyTree, images: Array) -> Array:
        out, _ = model.apply({"params": params}, preprocess(images, size=image_size))
        return out["patches"]

    def load() -> PyTree:
        if not pathlib.Path(weights).is_file():
            folder, file, repository = _FILES[architecture]
            raise UserError(
                f"the teacher's weights are missing: config.forward.teacher.weights is {weights!r}"
                f"{' and no such file exists' if weights else ''}. Download "
                f"{_URL}/{folder}/{file}_pretrain.pth (or model.safetensors of {repository} on "
                "Hugging Face) and pass --config.forward.teacher.weights=FILE."
            )
        return from_official(read_weights(weights), model)

    return Teacher(apply, lambda: _shapes(model), load)


def preprocess(
    images: UInt8[Array | np.ndarray, "batch height width 3"], *, size: int
) -> Float[Array, "batch {size} {size} 3"]:
    """Divides by 255, normalises by ImageNet's statistics and then resizes to ``size``.

    The resize is PyTorch's bicubic interpolation without antialiasing (a = -0.75, half-pixel
    centres), in float32, as in sihyun-yu/REPA@67f7145:train.py:45-48.
    """
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    normalized = (jnp.asarray(images, jnp.float32) / 255.0 - mean) / std
    rows, columns = (bicubic_matrix(old, size, antialias=False) for old in images.shape[1:3])
    return jnp.einsum("rh,cw,bhwd->brcd", rows, columns, normalized, precision="highest")


def read_weights(path: str | pathlib.Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns the tensors of a ``.safetensors`` or PyTorch file under the official names.

    Both namings are read, facebookresearch/dinov2's and that of Hugging Face's ``Dinov2Model``.

    Raises:
        UserError: no such file, or not a file of tensors.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        return official_names(read_torch_state_dict(path))
    try:
        return official_names(safetensors.numpy.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error


def official_names(weights: StateDict) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Renames the tensors of Hugging Face's ``Dinov2Model``; official names stay as they are.

    Its separate query, key and value projections become the official fused one.
    """
    renamed, separate = {}, {}
    for name, value in weights.items():
        for pattern, replacement in _FROM_HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        fused, _, which = name.partition("@")
        if which:
            separate.setdefault(fused, {})[which] = value
        else:
            renamed[name] = value
    for fused, parts in separate.items():
        if len(parts) != 3:
            raise UserError(f"{fused}: of query, key and value there is only {', '.join(parts)}.")
        renamed[fused] = np.concatenate([parts[which] for which in ("query", "key", "value")])
    return renamed


def from_official(weights: StateDict, model: ViT) -> PyTree:
    """Returns the parameters of ``model`` from a state dict under the official names.

    ``mask_token``, of use in pretraining only, is dropped.

    Raises:
        UserError: tensors missing, unexpected or of a wrong shape, each named.
    """
    names = _official_paths(model)
    missing = sorted(names.keys() - weights.keys())
    unexpected = sorted(weights.keys() - names.keys() - {_MASK_TOKEN})
    if missing or unexpected:
        raise UserError(
            "the weights are not this DINOv2's: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}."
        )
    values = {}
    for name, path in names.items():
        value = np.asarray(weights[name], np.float32)
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif path[-1] == "kernel":
            value = value.T
        elif value.ndim == 3:
            value = value[0]
        if path[-2:-1] == ("qkv",):
            value = heads_first(value, heads=model.heads)
        values[path] = value
    unrolled = jax.eval_shape(lambda params: _unrolled(params, model), _shapes(model))
    expected = traverse_util.flatten_dict(unrolled)
    wrong = [
        f"{name} (becomes {values[path].shape}, needs {expected[path].shape})"
        for name, path in names.items()
        if values[path].shape != expected[path].shape
    ]
    if wrong:
        raise UserError(f"the weights are not this DINOv2's: wrong shapes: {_some(wrong)}.")
    params = traverse_util.unflatten_dict(values)
    return {**params, "blocks": stack_blocks(params["blocks"])} if model.scan else params


def to_official(params: PyTree, model: ViT) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns a state dict that the official model loads: the inverse of `from_official`.

    ``mask_token``, which a `ViT` does not have, is zero, its value before pretraining.
    """
    values = traverse_util.flatten_dict(_unrolled(params, model))
    weights = {_MASK_TOKEN: np.zeros((1, model.width), np.float32)}
    for name, path in _official_paths(model).items():
        value = np.asarray(values[path])
        if path[-2:-1] == ("qkv",):
            value = heads_second(value, heads=model.heads)
        if name == "patch_embed.proj.weight":
            patch = (model.patch_size, model.patch_size, -1, model.width)
            value = value.reshape(patch).transpose(3, 2, 0, 1)
        elif path[-1] == "kernel":
            value = value.T
        elif value.ndim == 2:
            value = value[None]
        weights[name] = np.ascontiguousarray(value)
    return weights


_MASK_TOKEN = "mask_token"

_FROM_HUGGING_FACE = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.(weight|bias)$", r".attn.qkv.\2@\1"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def _official_paths(model: ViT) -> dict[str, tuple[str, ...]]:
    """Maps every official name to its path in the parameters of a ViT without scan."""
    paths = {"cls_token": ("class_token",), "pos_embed": ("positions",)}
    if model.registers:
        paths["register_tokens"] = ("registers",)
    linears, norms = {"patch_embed.proj": ("patch_embedding",)}, {"norm": ("final_norm",)}
    for number in range(model.depth):
        official, block = f"blocks.{number}", ("blocks", f"block_{number + 1}")
        linears |= {
            f"{official}.attn.qkv": (*block, "attention", "qkv"),
            f"{official}.attn.proj": (*block, "attention", "proj"),
            f"{official}.mlp.fc1": (*block, "mlp", "fc1"),
            f"{official}.mlp.fc2": (*block, "mlp", "fc2"),
        }
        for half in (1, 2):
            norms[f"{official}.norm{half}"] = (*block, f"norm_{half}")
            paths[f"{official}.ls{half}.gamma"] = (*block, f"layer_scale_{half}")
    for group, weight in ((linears, "kernel"), (norms, "scale")):
        for official, path in group.items():
            paths |= {f"{official}.weight": (*path, weight), f"{official}.bias": (*path, "bias")}
    return paths


def _unrolled(params: PyTree, model: ViT) -> PyTree:
    return {**params, "blocks": unstack_blocks(params["blocks"])} if model.scan else params


def _shapes(model: ViT) -> PyTree:
    image = jax.ShapeDtypeStruct((1, model.patch_size, model.patch_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
