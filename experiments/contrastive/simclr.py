"""SimCLR (Chen et al. 2020, arXiv:2002.05709): two augmented views of an image attract each other.

Variant ``fashion_mnist`` trains the small encoder that other experiments use as a teacher that
never saw a label; ``fashion_mnist_resnet`` is the same with a residual network, whose batch
statistics are state. ``imagenet224_resnet50`` holds the official hyper-parameters of the paper's
1,000-epoch run (google-research/simclr@be133b3: run.py, model_util.py). ``imagenet224_vit_b16``
holds those by which MoCo v3 (arXiv:2104.02057, which reports SimCLR too) trains a ViT-B:
facebookresearch/moco-v3@c349e6e:CONFIG.md.

The table takes the method apart as sections 3 to 5 of the paper do: the two augmentations, the
projection head, the batch. Fashion-MNIST is grey, so that colour distortion is a jitter of
brightness and contrast.
"""

import functools

from ml_collections import ConfigDict

from repalign.models import resnet, vit
from repalign.registry import lookup
from repalign.tables.claims import Greater
from repalign.tables.table import Column, Difference, Table

EXAMPLES, BATCH = 1_281_167, 4096

CONVNET = {"name": "models.convnet.ConvNet", "widths": (24, 48, 96), "blocks": 1}
SMALL_CONVNET = {"name": "models.convnet.ConvNet", "widths": (16, 32, 64)}
RESNET = {
    "name": "models.resnet.ResNet",
    "blocks": (1, 1, 1),
    "bottleneck": False,
    "stem": "cifar",
    "width": 16,
}


def fashion_mnist(model: dict) -> ConfigDict:
    """A convolutional encoder on the 12,000 packaged images; a minute or two on two cores."""
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 256,
            },
            "model": model,
            "forward": {
                "name": "train.forward.two_views",
                "view": {"crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "blur": 0.0},
                "head_hidden": 128,
                "head_features": 64,
            },
            "objective": {
                "nt_xent": {
                    "term": "losses.contrastive.nt_xent",
                    "a": "view_0/embedding",
                    "b": "view_1/embedding",
                    "temperature": 0.2,
                }
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-4,
            },
            "evaluation": {
                "metrics": {
                    "encoder": {
                        "name": "train.evaluate.encoder_probe",
                        "reference": {"name": "data.fashion_mnist.fashion_mnist", "split": "test"},
                        "classes": 10,
                    }
                }
            },
            "seed": 0,
            "total_steps": 600,
        }
    )


def ablation(
    *,
    view: dict | None = None,
    head_layers: int = 2,
    batch_size: int = 256,
    total_steps: int = 200,
) -> ConfigDict:
    """One row of the table: the same run with a smaller network and one part changed.

    The learning rate of all rows is the best of 1e-3, 2e-3 and 4e-3, both at batch 256 and at batch
    32, after 200 steps of one seed that the table does not use (docs/simclr/README.md).

    Args:
        view: fields of the recipe that differ.
        head_layers: 2 is the nonlinear head, 1 a linear one, 0 none.
        batch_size, total_steps: of the row.
    """
    config = fashion_mnist(SMALL_CONVNET)
    config.data.batch_size = batch_size
    config.forward.view.update(view or {})
    config.forward.head_layers = head_layers
    config.optimizer.learning_rate = 4e-3
    config.total_steps = total_steps
    if head_layers:
        after = {"tap": "projection", "prefix": "projection_"}
        config.evaluation.metrics.projection = {**config.evaluation.metrics.encoder, **after}
    return config


def imagenet224(
    model: dict, *, head: dict, temperature: float, optimizer: dict, epochs: int
) -> ConfigDict:
    """An encoder on ImageNet with batches of 4,096 images and SimCLR's views.

    The data set ``imagenet256`` is prepared by the user with TFDS: ``image`` uint8 [256, 256, 3],
    the shorter side resized and the centre cut out, ``label``. Random crops to 224 pixels are cut
    out of these where the official loader crops the original files. Computation is in bfloat16,
    parameters and batch statistics are float32.
    """
    return ConfigDict(
        {
            "data": {
                "source": {
                    "name": "data.sources.tfds_source",
                    "dataset": "imagenet256",
                    "split": "train",
                    "keys": ("image", "label"),
                    "data_dir": "",
                },
                "batch_size": BATCH,
                "spec": {"image": ((256, 256, 3), "uint8"), "label": ((), "int32")},
            },
            "model": {**model, "dtype": "bfloat16"},
            "forward": {
                "name": "train.forward.two_views",
                "view": {"size": 224},
                "head_norm": "batch",
                "head_norm_last": True,
                **head,
            },
            "objective": {
                "nt_xent": {
                    "term": "losses.contrastive.nt_xent",
                    "a": "view_0/embedding",
                    "b": "view_1/embedding",
                    "temperature": temperature,
                }
            },
            "optimizer": {"schedule": "cosine", "no_decay": ("bias", "scale"), **optimizer},
            "seed": 0,
            "total_steps": EXAMPLES * epochs // BATCH + 1,
            "checkpoint_every": 10 * EXAMPLES // BATCH,
        }
    )


VARIANTS = {
    "fashion_mnist": functools.partial(fashion_mnist, CONVNET),
    "fashion_mnist_resnet": functools.partial(fashion_mnist, RESNET),
    "crop_and_colour": ablation,
    "crop": functools.partial(ablation, view={"jitter": 0.0}),
    "colour": functools.partial(ablation, view={"crop_scale": None, "flip": 0.0}),
    "linear_head": functools.partial(ablation, head_layers=1),
    "no_head": functools.partial(ablation, head_layers=0),
    "batch_32": functools.partial(ablation, batch_size=32),
    "batch_32_equal_images": functools.partial(ablation, batch_size=32, total_steps=1600),
    # The warm-up starts at a rate of 0: this step leaves the weights as they were drawn.
    "random_encoder": functools.partial(ablation, total_steps=1),
    "imagenet224_resnet50": functools.partial(
        imagenet224,
        {"name": "models.resnet.ResNet", **resnet.SIZES["50"]},
        head={"head_hidden": 2048, "head_features": 128, "head_layers": 2},
        temperature=0.1,
        optimizer={
            "name": "lars",
            "learning_rate": 0.3 * BATCH / 256,
            "warmup_steps": 10 * EXAMPLES // BATCH,
            "weight_decay": 1e-6,
            "momentum": 0.9,
        },
        epochs=1000,
    ),
    # Two differences from MoCo v3: SimCLR's views are the same recipe twice, and the patch
    # embedding is trained.
    "imagenet224_vit_b16": functools.partial(
        imagenet224,
        {
            "name": "models.vit.ViT",
            **vit.SIZES["B"],
            "image_size": 224,
            "patch_size": 16,
            "position": "sincos",
            "scan": True,
            "remat": "dots_with_no_batch_dims_saveable",
        },
        head={"head_hidden": 4096, "head_features": 256, "head_layers": 3},
        temperature=0.2,
        optimizer={
            "name": "adamw",
            "learning_rate": 1.5e-4 * BATCH / 256,
            "warmup_steps": 40 * EXAMPLES // BATCH,
            "weight_decay": 0.1,
        },
        epochs=300,
    ),
}


def get_config(variant: str = "fashion_mnist") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of simclr")().lock()


FULL = "SimCLR (crop and colour, nonlinear head, batch 256)"
RANDOM = "random encoder"

TABLE = Table(
    paper=106,
    rows={
        FULL: "crop_and_colour",
        "crop only": "crop",
        "colour only": "colour",
        "linear head": "linear_head",
        "no head": "no_head",
        "batch 32, equal steps": "batch_32",
        "batch 32, equal images": "batch_32_equal_images",
        RANDOM: "random_encoder",
    },
    columns=(
        Column("linear_probe", better="higher"),
        Column("knn_probe", better="higher"),
        Column("projection_linear_probe", title="linear probe after the head", better="higher"),
        Column(
            "before_minus_after",
            title="before minus after the head",
            derive=Difference("linear_probe", minus="projection_linear_probe"),
        ),
    ),
    claims=(
        Greater("linear_probe", FULL, "crop only"),
        Greater("linear_probe", FULL, "colour only"),
        Greater("linear_probe", FULL, "linear head"),
        Greater("linear_probe", "linear head", "no head"),
        Greater("before_minus_after", FULL, than=0.0),
        Greater("linear_probe", FULL, "batch 32, equal steps"),
        Greater("linear_probe", FULL, "batch 32, equal images"),
        Greater("linear_probe", FULL, RANDOM),
        Greater("linear_probe", "crop only", RANDOM),
        Greater("linear_probe", "colour only", RANDOM),
        Greater("linear_probe", "no head", RANDOM),
        Greater("linear_probe", "batch 32, equal steps", RANDOM),
    ),
)
