"""What the root of a backbone shows of us: nothing, to its own code, its hooks, its length."""

import copy

import pytest
import torch
from torch import nn

import deltaspec
from deltaspec import DeltaSpecError

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Residual(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


class Concatenated(nn.ModuleList):
    def forward(self, x):
        return torch.cat([layer(x) for layer in self], -1)


class Named(nn.ModuleDict):
    def forward(self, x):
        return {name: layer(x) for name, layer in self.items()}


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


ROOTS = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "residual": lambda: Residual(nn.Linear(4, 4)),
    "list": lambda: Concatenated([nn.Linear(4, 4), nn.Linear(4, 4)]),
    "dict": lambda: Named({"x": nn.Linear(4, 4)}),
    "children": Children,
}


def spec(method="lora", target=None, **params):
    target = target or {"type": "Linear"}
    return {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": target, "params": params}]}


def perturb(compiled):
    with torch.no_grad():
        for parameter in compiled.deltas["d"].parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))


def bits(output):
    return list(output.values()) if isinstance(output, dict) else [output]


def equal(a, b):
    return len(bits(a)) == len(bits(b)) and all(map(torch.equal, bits(a), bits(b)))


@pytest.mark.parametrize("capture", ["modules", "auto"])
@pytest.mark.parametrize("root", ROOTS)
def test_a_root_that_goes_through_its_children_does_not_meet_the_deltas(root, capture):
    torch.manual_seed(0)
    model = ROOTS[root]()
    compiled = deltaspec.compile(model, spec(), capture=capture, example_inputs=X)
    assert equal(compiled(X), model(X))
    assert [n for n, _ in compiled.backbone.named_children()] == [n for n, _ in model.named_children()]
    assert set(model.state_dict()) < set(compiled.backbone.state_dict())
    perturb(compiled)
    changed = compiled(X)
    assert not equal(changed, model(X))
    assert equal(copy.deepcopy(compiled)(X), changed)
    assert equal(compiled.detach()(X), model(X))
    for merged, attached in zip(bits(compiled.merge("d")(X)), bits(changed), strict=True):
        torch.testing.assert_close(merged, attached)


@pytest.mark.parametrize("capture", ["modules", "auto"])
def test_hooks_of_the_root_see_positional_arguments(capture):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output + args[0].sum())
    compiled = deltaspec.compile(model, spec(), capture=capture)
    assert torch.equal(compiled(X), model(X))
    assert torch.equal(compiled.detach()(X), model(X))


def test_a_hook_on_a_site_sees_what_leaves_the_delta_in_every_capture():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    compiled = deltaspec.compile(model, spec())
    assert compiled.capture == "modules" and "hooks" in compiled.capture_reason
    with pytest.raises(DeltaSpecError, match="DS432"):
        deltaspec.compile(model, spec(), capture="symbolic")
    perturb(compiled)
    torch.testing.assert_close(compiled(X), compiled.merge()(X))


def test_an_embedding_that_renormalises_itself_does_not_reach_the_original():
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0))
    before = model[0].weight.detach().clone()
    deltaspec.compile(model, spec(target="0"))(torch.arange(10)[None])
    assert torch.equal(before, model[0].weight)


def test_buffers_that_one_delta_wrote_do_not_reach_the_next():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    document = spec(target="1")
    document["deltas"].append({"name": "e", "method": "lora", "target": "1"})
    compiled = deltaspec.compile(model, document).eval()
    perturb(compiled)
    compiled.only("e")
    expected = compiled(X)
    compiled.only("d")
    compiled.train()
    for _ in range(3):
        compiled(X)
    compiled.eval()
    compiled.only("e")
    assert torch.equal(compiled(X), expected)


def test_a_layer_of_width_zero():
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    x = torch.ones(2, 3)
    assert torch.equal(deltaspec.compile(model, spec())(x), model(x))


def test_what_cannot_be_compiled_says_so():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    with pytest.raises(DeltaSpecError, match="DS430.*inference_mode"):
        deltaspec.compile(nn.Sequential(model), spec())
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not NoneType"):
        deltaspec.compile(None, spec())
    with pytest.raises(TypeError, match="a spec is a path, a dict or a DeltaSpec, not int"):
        deltaspec.compile(nn.Linear(4, 4), 5)
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), spec())
    with pytest.raises(DeltaSpecError, match="DS431"):
        deltaspec.compile(compiled, spec())
    with pytest.raises(TypeError, match="one by one"):
        compiled.attach(["d"])


def test_a_copy_keeps_what_users_put_on_the_compiled_model():
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), spec())
    compiled.note = {"run": 3}
    twin = copy.deepcopy(compiled)
    assert twin.note == {"run": 3} and twin.note is not compiled.note


def test_loading_compares_what_the_tensors_mean(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    deltaspec.compile(model, spec(rank=2)).save(tmp_path)
    other = deltaspec.compile(model, spec(rank=2, alpha=99.0))
    with pytest.raises(DeltaSpecError, match=r"DS529.*params.alpha was 16.0.*99.0"):
        other.load(tmp_path)
    deltaspec.compile(model, spec(rank=2, dropout=0.5)).load(tmp_path)


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "adalora", "hira", "oft", "ia3", "adapter", "full"])
@pytest.mark.parametrize("architecture", ["opt", "bart", "pegasus"])
def test_position_tables_that_take_more_than_ids(architecture, method):
    """Their classes look ids up by code of their own, and are called with several arguments."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 1}
    if architecture == "opt":
        from transformers import OPTConfig, OPTForCausalLM

        small = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2}
        model = OPTForCausalLM(OPTConfig(**sizes, **small, word_embed_proj_dim=16))
        inputs, target = {"input_ids": torch.randint(3, 48, (2, 5))}, "**.embed_positions"
    else:
        from transformers import BartConfig, BartModel, PegasusConfig, PegasusModel

        config, kind = (BartConfig, BartModel) if architecture == "bart" else (PegasusConfig, PegasusModel)
        small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
        model = kind(config(**sizes, **small))
        inputs = {"input_ids": torch.randint(3, 48, (2, 5)), "decoder_input_ids": torch.randint(3, 48, (2, 4))}
        target = "encoder.embed_positions"
    delta = {"name": "a", "method": method, "target": target, "params": {"block_size": 4} if method == "oft" else {}}
    if method not in ("ia3", "adapter", "full", "oft"):
        delta["params"] = {"rank": 2}
    try:
        compiled = deltaspec.compile(model.eval(), {"deltaspec": 1, "deltas": [delta]})
    except DeltaSpecError as error:
        # Pegasus looks its table up without gradients, so only a method around the call could be trained.
        still = architecture == "pegasus" and method != "adapter"
        assert {finding.code for finding in error.diagnostics} <= {"DS402", "DS403" if still else "DS402"}
        assert all(finding.suggestion for finding in error.diagnostics)
        return
    with torch.no_grad():
        bare = model(**inputs)[0]
        assert torch.equal(compiled(**inputs)[0], bare)
        for parameter in compiled.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        changed = compiled(**inputs)[0]
        assert not torch.equal(changed, bare)
        if method != "adapter":
            torch.testing.assert_close(compiled.merge()(**inputs)[0], changed, rtol=1e-4, atol=1e-5)
