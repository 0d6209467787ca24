"""How a compiled model looks to other libraries: what it says to be, what they set on it, and PEFT's verbs."""

import pytest
import torch
import transformers
from four_deltas import build as build_net
from torch import nn
from two_deltas import build

import deltaspec
from deltaspec.compiler.adapter_verbs import ADAPTERS
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError


def test_it_says_to_be_a_model_of_transformers_where_its_backbone_is_one():
    compiled = build("bert")
    assert isinstance(compiled, transformers.PreTrainedModel | CompiledModel) and isinstance(compiled, CompiledModel)
    assert isinstance(compiled, transformers.BertForSequenceClassification) and isinstance(
        compiled, torch.fx.GraphModule
    )
    assert type(compiled).__mro__[1] is CompiledModel and repr(compiled).startswith("CompiledModel(")
    assert not isinstance(build_net("branching"), transformers.PreTrainedModel)


def test_what_is_set_lands_where_it_is_read():
    compiled = build("gpt2")
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    compiled.generation_config = settings
    assert compiled.backbone.generation_config is settings and "generation_config" not in vars(compiled)
    assert compiled.generate(input_ids=torch.tensor([[1, 2]])).shape == (1, 4)
    compiled.note, compiled.training = "mine", False
    assert vars(compiled)["note"] == "mine" and not hasattr(compiled.backbone, "note")
    compiled.probe = nn.Linear(2, 2)
    assert "probe" in compiled._modules and "probe" not in compiled.backbone._modules


def test_verbs_of_peft_name_ours_and_put_nothing_in():
    compiled = build("bert")
    before = [type(module) for module in compiled.modules()]
    refused = 0
    for verb, ours in ADAPTERS.items():
        assert not hasattr(compiled, verb)
        for model in (compiled, compiled.backbone):
            if hasattr(type(compiled.backbone), verb) or model is compiled:
                refused += 1
                with pytest.raises(DeltaSpecError, match="DS475") as error:
                    getattr(model, verb)("default")
                assert ours in str(error.value)
    assert refused > len(ADAPTERS) and [type(module) for module in compiled.modules()] == before
    assert all(hasattr(CompiledModel, word) for word in ("only", "attach", "detach", "detached", "attached"))


class Unloading(nn.Sequential):
    """Has a method of its own that PEFT has a verb of the same name for."""

    def unload(self):
        return "mine"


def test_methods_of_the_users_own_model_are_not_refused():
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"path": "0"}}]}
    compiled = deltaspec.compile(Unloading(nn.Linear(4, 4)), spec, example_inputs=torch.ones(1, 4))
    assert compiled.unload() == compiled.backbone.unload() == "mine"
    with pytest.raises(AttributeError, match="set_adapter"):
        compiled.set_adapter("d")
