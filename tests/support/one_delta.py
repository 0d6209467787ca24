"""One delta on models of a line."""

import torch

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def single(method="lora", target=None, **params):
    target = target or {"type": "Linear"}
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}


def perturb(compiled):
    with torch.no_grad():
        for parameter in compiled.deltas["d"].parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
