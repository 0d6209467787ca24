"""The module table against models whose every fact is known, or counted by torch itself."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.diagnostics.findings import DeltaSpecError

TINY = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32)


def by_name(model):
    return {row.fqn: row for row in tabulate(model).rows}


class HomeMadeRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class NotANorm(nn.Module):
    """Ends in Norm, but has no one-dimensional weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class LoudLinear(nn.Linear):
    pass


class FrozenBatchNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(4))


class Same2d(nn.Conv2d):
    pass


KINDS = [
    (nn.Linear(3, 5), "linear", 3, 5),
    (LoudLinear(3, 5), "linear", 3, 5),
    (nn.MultiheadAttention(4, 2).out_proj, "linear", 4, 4),
    (transformers.pytorch_utils.Conv1D(5, 3), "conv1d", 3, 5),
    (nn.Embedding(7, 2), "embedding", 7, 2),
    (nn.Conv1d(4, 6, 3), "conv", 4, 6),
    (Same2d(4, 6, 3), "conv", 4, 6),
    (nn.Conv3d(4, 6, 3), "conv", 4, 6),
    (nn.ConvTranspose2d(4, 6, 3), "conv", 4, 6),
    (nn.LayerNorm(4), "norm", None, None),
    (nn.LayerNorm(4, elementwise_affine=False), "norm", None, None),
    (nn.GroupNorm(2, 4), "norm", None, None),
    (nn.RMSNorm(4), "norm", None, None),
    (nn.BatchNorm2d(4), "norm", None, None),
    (nn.InstanceNorm1d(4), "norm", None, None),
    (HomeMadeRMSNorm(4), "norm", None, None),
    (FrozenBatchNorm2d(), "norm", None, None),
    (transformers.models.llama.modeling_llama.LlamaRMSNorm(4), "norm", None, None),
    (NotANorm(), "other", None, None),
    (nn.LocalResponseNorm(2), "other", None, None),
    (nn.EmbeddingBag(7, 2), "other", None, None),
    (nn.Bilinear(2, 3, 4), "other", None, None),
    (nn.GELU(), "other", None, None),
]


@pytest.mark.parametrize(("module", "kind", "into", "out"), KINDS, ids=lambda v: type(v).__name__)
def test_kinds_and_widths(module, kind, into, out):
    row = by_name(nn.ModuleDict({"m": module}))["m"]
    assert (row.kind, row.in_features, row.out_features) == (kind, into, out)
    assert row.type == type(module).__name__ == row.bases[0] and not {"Module", "object"} & set(row.bases)


def test_bases_and_geometry():
    rows = by_name(
        nn.ModuleDict({"a": Same2d(4, 6, 3, groups=2), "b": nn.ConvTranspose1d(4, 6, 3), "c": LoudLinear(1, 1)})
    )
    assert rows["a"].bases == ("Same2d", "Conv2d", "_ConvNd") and rows["c"].bases == ("LoudLinear", "Linear")
    assert (rows["a"].conv.groups, rows["a"].conv.transposed, rows["a"].conv_groups) == (2, False, 2)
    assert rows["b"].conv.transposed and rows["c"].conv is None and rows["c"].conv_groups == 1


def test_transformers_is_not_imported_for_plain_torch():
    code = (
        "import sys, torch; from deltaspec.backbone.tabulate import tabulate\n"
        "tabulate(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        "assert not any(m.split('.')[0] == 'transformers' for m in sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BART = dict(d_model=8, vocab_size=32, encoder_layers=2, decoder_layers=2)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
MODELS = [
    ("bert", "BertForMaskedLM", dict(TINY, max_position_embeddings=16)),
    ("gpt2", "GPT2LMHeadModel", dict(n_embd=8, n_layer=2, n_head=2, vocab_size=32, n_positions=16)),
    ("t5", "T5ForConditionalGeneration", dict(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)),
    ("bart", "BartForConditionalGeneration", BART),
    ("albert", "AlbertForMaskedLM", dict(TINY, max_position_embeddings=16)),
    ("mixtral", "MixtralForCausalLM", dict(TINY, num_key_value_heads=1)),
]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("kind", "name", "sizes"), MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_the_table_agrees_with_torch(kind, name, sizes, device):
    with torch.device(device):
        model = getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**sizes))
    before = {k: (v._version, v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()}
    table = tabulate(model)
    assert {k: (v._version, v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()} == before
    modules = dict(model.named_modules())
    assert [row.fqn for row in table.rows] == list(modules)
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert (table.model_class, table.model_type, table.module) == (name, kind, type(model).__module__)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = {}
    for fqn, parameter in parameters.items():
        holders.setdefault(id(parameter), []).append(fqn)
    for row in table.rows:
        module = modules[row.fqn]
        assert row.subtree_parameters == sum(p.numel() for p in module.parameters())
        assert row.children == len(list(module.children()))
        assert [p.name for p in row.parameters] == [n for n, _ in module.named_parameters(recurse=False)]
        for p in row.parameters:
            actual = parameters[p.fqn]
            assert p.shape == tuple(actual.shape) and f"torch.{p.dtype}" == str(actual.dtype)
            assert p.count == actual.numel() and row.shape_of(p.name) == p.shape
            assert set(p.tied) == set(holders[id(actual)]) - {p.fqn}
        keys = {k.removeprefix(f"{row.fqn}.") for k in model.state_dict() if k.startswith(f"{row.fqn}.") or not row.fqn}
        persistent = {n for n, _ in module.named_buffers(recurse=False)} & keys
        assert {b.name for b in row.buffers} == persistent


def test_tied_parameters_are_listed_on_both_sides_and_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    rows = by_name(model)
    assert rows["a"].parameters[0].tied == ("b.weight",) and rows["b"].parameters[0].tied == ("a.weight",)
    assert rows[""].subtree_parameters == 16 == rows["b"].subtree_parameters


def test_one_module_under_several_names_is_one_row():
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    rows = by_name(nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}))
    assert list(rows) == ["", "a", "a.0", "a.1", "b"]
    assert rows["a"].aliases == ("b.c",) and rows["a.0"].aliases == ("b.c.0",)
    assert rows["a.0"].parameters[0].tied == ()  # one holder, under two names
    assert rows["b"].subtree_parameters == rows["a"].subtree_parameters == rows[""].subtree_parameters == 6


def test_a_layer_used_twelve_times():
    layer = nn.Linear(2, 2)
    rows = by_name(nn.ModuleDict({"layers": nn.ModuleList([layer] * 12)}))
    assert rows["layers.0"].aliases == tuple(f"layers.{i}" for i in range(1, 12)) and rows[""].subtree_parameters == 6


def test_modules_that_hold_their_parent_or_share_endlessly():
    loop = nn.Module()
    loop.inner = nn.Linear(2, 2)
    loop.inner.parent = loop
    assert list(by_name(loop)) == ["", "inner"]
    module = nn.Linear(1, 1)
    for _ in range(40):  # 2 ** 40 names
        module = nn.ModuleDict({"a": module, "b": module})
    assert len(by_name(module)) == 41


def layers_of(model):
    return {row.fqn: (row.stack, row.layer) for row in tabulate(model).rows if row.stack is not None}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])


class Layer(nn.Module):
    pass


class Attention(Layer):
    pass


class StateSpace(Layer):
    pass


def test_layers_of_plain_torch():
    model = nn.ModuleDict(
        {"stem": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "blocks": nn.ModuleList([Block(), Block()])}
    )
    found = layers_of(model)
    assert found["blocks.1"] == found["blocks.1.experts.2"] == ("blocks", 1)  # the outermost list counts
    assert "stem.0" not in found and "blocks" not in found
    assert set(layers_of(nn.Sequential(Block(), Block())).values()) == {("", 0), ("", 1)}
    assert set(layers_of(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]))) == set()
    assert layers_of(nn.ModuleList([Attention(), StateSpace(), Attention()]))["1"] == ("", 1)  # a hybrid stack
    assert layers_of(nn.ModuleDict({"layers": nn.ModuleList([Layer()])}))["layers.0"] == ("layers", 0)
    wrapper = nn.ModuleDict({"w": nn.ModuleList([nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})])})
    assert layers_of(wrapper)["w.0.layers.1"] == ("w.0.layers", 1)
    assert layers_of(nn.ModuleDict({"m": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))})) == {}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3)
    assert layers_of(encoder)["layers.2.self_attn.out_proj"] == ("layers", 2)


def test_a_one_layer_transformer_has_a_stack():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(TINY, num_hidden_layers=1)))
    assert layers_of(model)["model.layers.0.self_attn.q_proj"] == ("model.layers", 0)


def test_a_wrapper_takes_the_model_type_of_the_one_model_inside():
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig(**TINY))
    table = tabulate(nn.ModuleDict({"body": bert, "head": nn.Linear(8, 2)}))
    assert table.model_type == "bert" and table.role_maps == ("bert",) and table.model_class == "ModuleDict"
    roles = {row.fqn: row.roles for row in table.rows}
    assert roles["body.encoder.layer.1.attention.self.query"] == ("attn.q",) and roles["head"] == ()
    assert tabulate(nn.Linear(1, 1)).model_type is None


def test_lazy_modules_are_refused_with_a_way_out():
    with pytest.raises(DeltaSpecError) as caught:
        tabulate(nn.Sequential(nn.LazyLinear(3)))
    assert caught.value.diagnostics[0].code == "DS310" and "0.weight is lazy" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused_with_a_way_out():
    with pytest.raises(DeltaSpecError, match=r"DS311\] 0 is a torch.jit.ScriptModule"):
        tabulate(nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2)))


def test_buffers_that_are_not_saved_are_left_out():
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(2))
    module.register_buffer("passing", torch.zeros(2), persistent=False)
    module.register_buffer("absent", None)
    module.register_parameter("none", None)
    row = by_name(module)[""]
    assert [b.name for b in row.buffers] == ["kept"] and row.parameters == ()


def test_rows_answer_about_their_parameters():
    row = by_name(nn.ModuleDict({"m": nn.Linear(3, 5, bias=False)}))["m"]
    assert row.has_parameter("weight") and not row.has_parameter("bias") and row.shape_of("weight") == (5, 3)
    with pytest.raises(KeyError):
        row.shape_of("bias")
