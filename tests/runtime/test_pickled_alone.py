"""Pickling: the compiled model goes as a whole; its backbone, or a part of it, refuses by name."""

import copy
import io
import pickle
import types
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.multiprocessing import reductions

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.body(x))


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held, self.head = held, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.held(x))


@pytest.fixture(params=["modules", "symbolic"])
def compiled(request):
    delta = {"name": "d", "method": "lora", "target": ["body.0", "out"], "params": {"rank": 2}}
    c = deltaspec.compile(Net(), {"deltaspec": 1, "deltas": [delta]}, capture=request.param)
    for parameter in c.trainable_parameters():
        nn.init.normal_(parameter)
    return c


def test_parts_refuse_by_name(compiled):
    for attached in (True, False):
        (compiled.attach if attached else compiled.detach)()
        for part in (compiled.backbone, Holder(compiled.backbone), {"c": compiled, "b": compiled.backbone}):
            for dump in (pickle.dumps, lambda part: torch.save(part, io.BytesIO())):
                with pytest.raises(DeltaSpecError, match="DS465") as caught:
                    dump(part)
                assert "a net may hold c in the place of c.backbone" in str(caught.value)


def test_a_net_that_holds_the_compiled_model_goes(compiled):
    x, net = torch.randn(3, 4), Holder(compiled)
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(x), net(x))
    twin.held.detach()
    assert not torch.equal(twin(x), net(x))


def test_copies_and_plain_models_are_whole(compiled):
    x = torch.randn(3, 4)
    assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(compiled)))(x), compiled(x))
    assert torch.equal(pickle.loads(pickle.dumps(compiled.view()))(x), compiled(x))
    merged = compiled.merge()
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), merged(x))
    assert not any("deltaspec" in name for module in merged.modules() for name in module.__dict__)


def test_functions_that_name_the_package_can_be_sent():
    """cloudpickle (Ray, Dask, joblib) sends modules by their name where their class is exactly this one."""
    assert type(deltaspec) is types.ModuleType
    for name in deltaspec.__all__:
        public = getattr(deltaspec, name)
        assert pickle.loads(pickle.dumps(public)) is public


def test_what_a_spawned_process_is_given_is_open_until_it_starts():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    delta = {"name": "d", "method": "lora", "target": ["0"], "params": {"rank": 2}}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    before = set(reductions.shared_cache)
    ForkingPickler(io.BytesIO()).dump(compiled)
    sent = [reductions.shared_cache[key] for key in set(reductions.shared_cache) - before]
    assert len(sent) == len(list(compiled.parameters())) + len(list(compiled.buffers()))
    assert not any(reference.expired() for reference in sent)
