"""A classifier trained on labels: its encoder is the feature space in which images are compared."""

from ml_collections import ConfigDict

from repalign.registry import lookup


def fashion_mnist() -> ConfigDict:
    """A convolutional network on the 12,000 packaged images."""
    return ConfigDict(
        {
            "data": {
                "source": {"name": "data.fashion_mnist.fashion_mnist", "split": "train"},
                "batch_size": 128,
            },
            "model": {"name": "models.convnet.ConvNet", "widths": (24, 48, 96), "blocks": 1},
            "forward": {"name": "train.forward.supervised", "classes": 10},
            "objective": {
                "cross_entropy": {
                    "term": "optax:softmax_cross_entropy_with_integer_labels",
                    "logits": "classifier/logits",
                    "labels": "label",
                }
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-3,
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
            "total_steps": 800,
        }
    )


VARIANTS = {"fashion_mnist": fashion_mnist}


def get_config(variant: str = "fashion_mnist") -> ConfigDict:
    """Returns the locked config of a variant."""
    return lookup(VARIANTS, variant, kind="variant of classifier")().lock()
