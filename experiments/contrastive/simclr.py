"""SimCLR (Chen et al. 2020, arXiv:2002.05709): two augmented views of an image attract each other.

Variant ``fashion_mnist`` trains the small encoder that other experiments use as a teacher that
never saw a label.
"""

from ml_collections import ConfigDict

from repalign.registry import lookup


def fashion_mnist() -> ConfigDict:
    """A convolutional encoder on the 12,000 packaged images; a minute or two on two cores."""
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 256,
            },
            "model": {"name": "models.convnet.ConvNet", "widths": (24, 48, 96), "blocks": 1},
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


VARIANTS = {"fashion_mnist": fashion_mnist}


def get_config(variant: str = "fashion_mnist") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of simclr")().lock()
