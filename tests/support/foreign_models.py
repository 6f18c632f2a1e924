"""Models from other libraries, and how ``convert`` changes them.

    python tests/support/foreign_models.py          # a Markdown table: what is synced, what is not and why
    python tests/support/foreign_models.py --steps  # also compares a training step on two ranks with one process

Each model is its library's architecture without pretrained weights, narrower than usual where the library allows it.
Dropout is off, so that two runs can be compared. All is fp64, because deep networks amplify rounding errors.
"""

import argparse
import functools
import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from shims.torchvision_operators import make_torchvision_importable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncnorm
from syncnorm.testing import assert_matches_single_process

LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "smp": "segmentation_models_pytorch",
    "monai": "monai",
}


class Field(nn.Module):
    """A model of transformers that returns one field of its output, a tensor."""

    def __init__(self, model: nn.Module, field: str):
        super().__init__()
        self.model = model
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[self.field]


def timm(name: str, **options: object) -> nn.Module:
    make_torchvision_importable()
    return importlib.import_module("timm").create_model(name, num_classes=5, **options)


def smp(name: str, **options: object) -> nn.Module:
    make_torchvision_importable()
    library = importlib.import_module("segmentation_models_pytorch")
    return getattr(library, name)("resnet18", encoder_weights=None, classes=2, **options)


def monai(name: str, **options: object) -> nn.Module:
    return getattr(importlib.import_module("monai.networks.nets"), name)(**options)


def transformers(model: str, config: str, field: str, **options: object) -> nn.Module:
    make_torchvision_importable()
    library = importlib.import_module("transformers")
    return Field(getattr(library, model)(getattr(library, config)(**options)), field)


def conformer(**options: object) -> nn.Module:
    made = transformers("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", "last_hidden_state", **options)
    made.model.feature_extractor._freeze_parameters()  # as in fine-tuning; otherwise its input must be a leaf
    return made


def detr() -> nn.Module:
    make_torchvision_importable()
    library = importlib.import_module("transformers")
    backbone = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = library.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=4,
    )
    return Field(library.DetrForObjectDetection(config), "logits")


@dataclass(frozen=True)
class Model:
    """A model, the shape of one sample, and whether its output leaves parameters without a gradient."""

    library: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    unused: bool = False


_UNET = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
_DYNUNET = {
    **_UNET,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [8, 8, 8],
}
_RGB = (3, 64, 64)

MODELS = {
    **{
        f"timm {name}": Model("timm", functools.partial(timm, name, **options), sample)
        for name, options, sample in [
            ("resnet18", {}, _RGB),
            ("efficientnet_b0", {}, _RGB),
            ("mobilenetv3_small_050", {}, _RGB),
            ("regnetx_002", {}, _RGB),
            ("densenet121", {"growth_rate": 8}, _RGB),
            ("repvgg_a0", {}, _RGB),
            ("levit_128s", {}, (3, 224, 224)),
            ("convnext_atto", {}, _RGB),
        ]
    },
    "transformers ResNet": Model(
        "transformers",
        functools.partial(
            transformers,
            "ResNetForImageClassification",
            "ResNetConfig",
            "logits",
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 2, 1, 1],
        ),
        _RGB,
    ),
    "transformers SegFormer": Model(
        "transformers",
        functools.partial(
            transformers,
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            "logits",
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 2],
            decoder_hidden_size=16,
            drop_path_rate=0.0,
        ),
        _RGB,
    ),
    "transformers MobileNetV2": Model(
        "transformers",
        functools.partial(
            transformers, "MobileNetV2ForImageClassification", "MobileNetV2Config", "logits", depth_multiplier=0.35
        ),
        _RGB,
    ),
    "transformers Wav2Vec2Conformer": Model(
        "transformers",
        functools.partial(
            conformer,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=5,
            layerdrop=0.0,
            mask_time_prob=0.0,
            attn_implementation="eager",
        ),
        (400,),
        unused=True,  # the embedding of masked frames gets no gradient
    ),
    "transformers PatchTST": Model(
        "transformers",
        functools.partial(
            transformers,
            "PatchTSTModel",
            "PatchTSTConfig",
            "last_hidden_state",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=2,
            d_model=8,
            num_attention_heads=2,
            ffn_dim=8,
            do_mask_input=False,
        ),
        (16, 2),
    ),
    "transformers DETR": Model("transformers", detr, _RGB, unused=True),  # the boxes get no gradient
    **{f"smp {name}": Model("smp", functools.partial(smp, name), _RGB) for name in ("Unet", "FPN", "DeepLabV3Plus")},
    "monai UNet, batch": Model(
        "monai",
        functools.partial(
            monai, "UNet", channels=(8, 16, 16), strides=(2, 2), num_res_units=1, norm="batch", **_UNET
        ),
        _RGB,
    ),
    "monai SegResNet, batch": Model(
        "monai", functools.partial(monai, "SegResNet", init_filters=8, norm="batch", **_UNET), _RGB
    ),
    "monai SegResNet": Model("monai", functools.partial(monai, "SegResNet", init_filters=8, **_UNET), _RGB),
    "monai DynUNet": Model("monai", functools.partial(monai, "DynUNet", **_DYNUNET), _RGB),
    "monai DynUNet, batch": Model("monai", functools.partial(monai, "DynUNet", norm_name="batch", **_DYNUNET), _RGB),
}


def installed(name: str) -> bool:
    return find_spec(LIBRARIES[MODELS[name].library]) is not None


def build(name: str) -> nn.Module:
    """The model, in training mode; ranks call this too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the libraries about their own code
        torch.manual_seed(0)
        model = MODELS[name].build().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
    return model


def samples(name: str, count: int) -> Tensor:
    return torch.randn(count, *MODELS[name].sample, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def assert_step_matches(name: str) -> None:
    """Checks that one training step on two ranks, with 3 and 2 samples, equals that on the whole batch."""
    assert_matches_single_process(
        functools.partial(build, name),
        samples(name, 5),
        splits=[3, 2],
        timeout=110,
        find_unused_parameters=MODELS[name].unused,
    )


def row(name: str, step: bool) -> list[str]:
    model = build(name)
    expected = batch_norms(model)
    layers = syncnorm.describe(syncnorm.convert(model))
    synced = sum(layer.synced for layer in layers)
    left = Counter((layer.type, layer.note.removeprefix("left alone: ")) for layer in layers if not layer.synced)
    fused = sum("fused" in layer.note for layer in syncnorm.describe(syncnorm.convert(model, fuse=True)))
    reasons = "; ".join(f"{count} {kind}: {note}" for (kind, note), count in left.items()) or "-"
    cells = [
        name,
        str(len(layers)),
        f"{synced} of {expected}" if synced < expected else str(synced),
        reasons,
        str(fused),
    ]
    if step:
        try:
            assert_step_matches(name)
            cells.append("equal" if synced else "equal (nothing to sync)")
        except (AssertionError, syncnorm.SyncNormError) as error:
            cells.append("differs: " + str(error).splitlines()[0][:120])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="also train each for one step, on two ranks and on one")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)  # many small convolutions; those in fp64 run group by group
    head = ["model", "norm layers", "synced", "left alone", "fused with their ReLU"]
    head += ["a step on 2 ranks and on 1"] * options.steps
    for cells in (head, ["---"] * len(head)):
        print("| " + " | ".join(cells) + " |")
    for name in filter(installed, MODELS):
        if options.only in name:
            print("| " + " | ".join(row(name, options.steps)) + " |", flush=True)
    packages = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch", "monai")
    print(
        "\n"
        + ", ".join(f"{package} {version(package)}" for package in packages if find_spec(package.replace("-", "_")))
    )


if __name__ == "__main__":
    main()
