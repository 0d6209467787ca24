"""Sites that read one input share their first product, unless it may be written in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec


class Attention(nn.Module):
    """One traceable attention: q, k and v read one input, and `spoil` may change it in between."""

    def __init__(self, spoil: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, width, bias=False) for width in (6, 6, 6, 4))
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.q(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        if self.spoil:
            x.mul_(2.0)
        k = self.k(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        v = self.v(x).unflatten(-1, (2, 3)).transpose(-2, -3)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


def attending(model: nn.Module, capture: str, *ranks: int) -> deltaspec.CompiledModel:
    deltas = [
        {"name": f"d{rank}", "method": "lora", "params": {"rank": rank}, "target": {"type": "Linear"}} for rank in ranks
    ]
    made = deltaspec.compile(
        model, {"deltaspec": 1, "deltas": deltas}, capture=capture, example_inputs=torch.ones(2, 5, 6)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in made.trainable_parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return made


@pytest.mark.parametrize("ranks", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 4, 6), (3, 40, 6), (0, 5, 6)], ids=str)
def test_sites_that_read_one_input_share_their_first_product(shape, ranks):
    torch.manual_seed(0)
    model = Attention().double()
    whole, apart = attending(model, "symbolic", *ranks), attending(model, "modules", *ranks)
    assert whole.regions[""].code.count("share_inputs_narrow_products(") == 1
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), apart(x), rtol=1e-12, atol=1e-12)
    given, expected = (torch.autograd.grad(c(x).square().sum(), list(c.trainable_parameters())) for c in (whole, apart))
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.compile(whole, fullgraph=True, backend="eager")(x), whole(x))
    whole.detach()
    assert torch.equal(whole(x), model(x))


def test_an_input_that_may_be_written_in_between_is_not_shared():
    torch.manual_seed(0)
    model = Attention(spoil=True).double()
    whole, apart = attending(model, "symbolic", 2), attending(model, "modules", 2)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), apart(x), rtol=1e-12, atol=1e-12)
    assert whole.regions[""].code.count("add_low_rank(") == 2  # q and o alone; k and v read what was written
