"""Others compute our layers by themselves only where they compute the same."""

import pytest
import torch
from torch import nn

from divnorm_kernels import convert_norm


class Encoders(nn.Module):
    """Torch's encoder, whose fast path reads its norms."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x, padded):
        return self.encoder(x, src_key_padding_mask=padded)[~padded]


@pytest.mark.parametrize("only", [None, "*norm1", "*.1.norm2"])
@pytest.mark.parametrize(
    ("to", "options"),
    [
        *((to, {}) for to in ("dn", "dn-mean-only", "rms", "ln*", "ln", "none", nn.RMSNorm)),
        *(("ln", options) for options in ({"activation": "relu"}, {"eps": 0.1}, {"bias": False})),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:convert_norm. not carried over", "ignore:The PyTorch API of nested tensors")
def test_torchs_fast_path_gives_what_the_layers_give(to, options, only):
    x, padded = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    model = convert_norm(Encoders(), to, only=only, report=None, **options).eval()
    with torch.no_grad():
        found = model(x, padded)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(x, padded)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if (to, options) == ("ln", {}):
        assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == [1, 1], "right, and fast"
