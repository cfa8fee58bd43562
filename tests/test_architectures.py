"""Models of other libraries, random and small: another layer of the same normalization leaves them as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import divnorm_kernels as dk
from divnorm_kernels import convert_norm

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = (2, 3, 64, 64)


def timm(name, **options):
    return pytest.importorskip("timm", exc_type=ImportError).create_model(name, **options)


def torchvision(name):
    return pytest.importorskip("torchvision.models", exc_type=ImportError).get_model(name, weights=None)


def transformers(name, **options):
    library = pytest.importorskip("transformers")
    return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**options))


def diffusers_unet():
    """With attention, whose norm gets (N, C, L)."""
    sizes = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    library = pytest.importorskip("diffusers", exc_type=ImportError)
    return library.UNet2DModel(**sizes, down_block_types=down, up_block_types=up)


def monai_unet(norm):
    nets = pytest.importorskip("monai.networks.nets", exc_type=ImportError)
    return nets.UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm=norm)


IDS = ((2, 7),)
MODELS = {
    "timm efficientnet_b0": (lambda: timm("efficientnet_b0"), "bn", (IMAGES,)),
    "timm mobilenetv3_small": (lambda: timm("mobilenetv3_small_050"), "bn", (IMAGES,)),
    "timm resnet10t": (lambda: timm("resnet10t"), "bn", (IMAGES,)),
    "timm regnetx_002": (lambda: timm("regnetx_002"), "bn", (IMAGES,)),
    "timm densenet": (lambda: timm("densenet121", block_config=(2, 2, 2, 2)), "bn", (IMAGES,)),
    "timm resnetv2": (lambda: timm("resnetv2_50", layers=(1, 1, 1, 1)), "bn", (IMAGES,)),
    "timm resnetv2, groups": (lambda: timm("resnetv2_50d_gn", layers=(1, 1, 1, 1)), "gn", (IMAGES,)),
    "timm convnext_atto": (lambda: timm("convnext_atto"), "ln", (IMAGES,)),
    "timm vit_tiny": (lambda: timm("vit_tiny_patch16_224", img_size=64, depth=3), "ln", (IMAGES,)),
    "torchvision mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), "bn", (IMAGES,)),
    "ResNet": (
        lambda: transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "bn",
        (IMAGES,),
    ),
    "ConvNeXt": (
        lambda: transformers("ConvNext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]),
        "ln",
        ((2, 3, 32, 32),),
    ),
    "ViT": (lambda: transformers("ViT", image_size=32, patch_size=8, **SMALL), "ln", ((2, 3, 32, 32),)),
    "BERT": (lambda: transformers("Bert", vocab_size=100, **SMALL), "ln", IDS),
    "Llama": (lambda: transformers("Llama", vocab_size=100, num_key_value_heads=2, **SMALL), "rms", IDS),
    "diffusers UNet2D": (diffusers_unet, "gn", ((2, 3, 16, 16), ())),
    "MONAI UNet, instance": (lambda: monai_unet("INSTANCE"), "in", ((2, 1, 16, 16, 16),)),
    "MONAI UNet, batch": (lambda: monai_unet("BATCH"), "bn", ((2, 1, 16, 16, 16),)),
}


def randomized(model):
    """A model in float64, without dropout, in which no parameter or buffer is what it starts from."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and t.dim() == 1 and "inv_freq" not in name:
            t.data.add_(0.2 * torch.rand_like(t))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def inputs(shapes, dtype):
    """Images, or a timestep, or the ids of tokens."""
    kinds = {0: lambda shape: torch.tensor(5), 2: lambda shape: torch.randint(0, 100, shape)}
    return [kinds.get(len(shape), lambda shape: torch.randn(shape, dtype=dtype))(shape) for shape in shapes]


def ran(model, given):
    y = model(*given)
    return y if isinstance(y, torch.Tensor) else y[0]


def norms(model):
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    named = (m for m in model.modules() if isinstance(m, kinds) or type(m).__name__.endswith(("RMSNorm", "NormAct2d")))
    return list(named)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_normalization_gives_the_same_model(name):
    make, to, shapes = MODELS[name]
    model = randomized(make())
    twin = convert_norm(model, to, inplace=False, report=None)
    assert norms(model)
    others = [m for m in twin.modules() if m in norms(twin) and not isinstance(m, dk.NormalizationLayer)]
    assert not others
    assert twin.state_dict().keys() == model.state_dict().keys()
    # batches of few values per channel divide by small variances, which float32 shows
    for training, dtype in ((False, torch.float32), (True, torch.float64)):
        given = inputs(shapes, dtype)
        expected, found = (ran(m.to(dtype).train(training), given) for m in (model, twin))
        scale = expected.detach().abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters()), allow_unused=True)
        for m, y in ((model, expected), (twin, found))
    ]
    largest = max(a.abs().max().item() for a in gradients[0] if a is not None)
    for (key, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * largest, msg=lambda m, key=key: f"{key}: {m}")
    for key, t in model.state_dict().items():
        torch.testing.assert_close(
            twin.state_dict()[key], t, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["diffusers UNet2D", "MONAI UNet, instance", "timm efficientnet_b0"])
def test_divisive_normalization_fits_every_place(name):
    make, _, shapes = MODELS[name]
    model = make()
    twin = convert_norm(copy.deepcopy(model), "dn", window=3, report=None)
    assert not [m for m in norms(twin) if not isinstance(m, dk.NormalizationLayer)]
    given = inputs(shapes, torch.float32)
    y, before = ran(twin.eval(), given), ran(model.eval(), given)
    assert y.shape == before.shape
    assert y.isfinite().all()
    assert not torch.allclose(y, before)
