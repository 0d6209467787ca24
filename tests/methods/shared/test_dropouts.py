from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from weight_methods import compiled, stir

from deltaspec.methods.shared.dropouts import drop_blocks, drop_update

X = torch.linspace(-1, 1, 48).reshape(4, 12)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("loha", {"rank": 2, "rank_dropout": 0.5}),
    ("lokr", {"rank": 1, "rank_dropout": 0.5, "rank_dropout_scale": True}),
    ("lokr", {"rank": 1, "module_dropout": 0.5}),
    ("oft", {"block_size": 2, "block_dropout": 0.5}),
    ("boft", {"block_size": 2, "factors": 2, "block_dropout": 0.5}),
    ("hira", {"rank": 2, "dropout": 0.5}),
]


@pytest.mark.parametrize(("method", "params"), CASES, ids=str)
def test_it_drops_while_training_and_then_alone(method: str, params: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).eval()
    dropping = compiled(model, (X,), method, params, "0")
    kept = {name: value for name, value in params.items() if "dropout" not in name}
    plain = compiled(model, (X,), method, kept, "0")
    for c in (dropping, plain):
        stir(c)
    assert torch.equal(dropping(X), plain(X)) or torch.allclose(dropping(X), plain(X), atol=1e-6)
    drawn = [dropping.train()(X) for _ in range(8)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    dropping(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dropping.deltas["d"].parameters())
    assert torch.allclose(dropping.eval()(X), plain(X), atol=1e-6)
    assert torch.allclose(dropping.merge("d")(X), plain(X), atol=1e-5)
    rows = dropping(X, deltas=["d", None, "d", "d"])
    torch.testing.assert_close(rows[0], plain(X)[0], atol=1e-5, rtol=1e-5)


def test_rows_and_wholes_of_an_update() -> None:
    torch.manual_seed(0)
    update, trains, not_ = torch.ones(1000, 3), torch.zeros(1), torch.ones(1)
    dropped = drop_update(trains, update, 0.3, False, 0.0)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert 0.6 < dropped.mean() < 0.8 and torch.equal(dropped[:, 0], dropped[:, 2])
    assert drop_update(trains, update, 0.3, True, 0.0).mean() == pytest.approx(1, abs=1e-5)
    whole = torch.stack([drop_update(trains, update, 0.0, False, 0.5).mean() for _ in range(40)])
    assert set(whole.tolist()) == {0.0, 1.0}
    assert torch.equal(drop_update(not_, update, 0.9, True, 0.9), update)


def test_blocks_of_one_factor() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(3, 10, 2, 2)
    dropped = drop_blocks(torch.zeros(1), blocks, 0.45)
    still = (dropped == torch.eye(2)).all(-1).all(-1)
    assert still.sum() == 4 and still.any(1).sum() == 1  # 45 percent of ten, rounded down, of one factor
    assert torch.equal(dropped[~still], blocks[~still])
    assert torch.equal(drop_blocks(torch.ones(1), blocks, 0.45), blocks)
