"""Deltas on what bitsandbytes, torchao and quanto make of a model."""

import bitsandbytes
import pytest
import torch
from torch import nn
from torchao import quantization as torchao
from trained import arguments, losses
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import deltaspec
from deltaspec.backbone.loading import model_from
from deltaspec.backbone.weight_forms import values_of
from deltaspec.methods.registry import methods
from deltaspec.training import DeltaTrainerMixin

FORMS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao float8": lambda: TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "quanto int4": lambda: QuantoConfig(weights="int4"),
}
WIDE = dict(vocab_size=96, bos_token_id=1, eos_token_id=2)
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, **WIDE)
GPT2 = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=32, **WIDE)
STARTING = [n for n, m in methods().items() if "initialise" in vars(type(m)) and m.promises.identity_at_start]
STARTING = [n for n in STARTING if methods()[n].promises.weight == "add"]
"""Methods with initial values of their own, which may depend on the weight."""
METHODS = {
    "dora": {"method": "lora", "params": {"rank": 2, "use_dora": True}},
    "pissa": {"method": "lora", "params": {"rank": 2, "init": "pissa"}},
    **{n: {"method": n, "params": dict(methods()[n].small)} for n in ("hira", "oft", "boft", *STARTING)},
}
IDS = torch.arange(8)[None] + 3


class DeltaTrainer(DeltaTrainerMixin, Trainer):
    pass


def spec(delta, target):
    return {"deltaspec": 1, "deltas": [{"name": "d", **delta, "target": {"path": target}}]}


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(request.param).save_pretrained(folder)
    return folder, "**.v_proj" if request.param is LLAMA else "**.c_attn"


@pytest.mark.parametrize("form", FORMS)
def test_attached_is_merged_and_the_plan_is_that_of_the_config(saved, form):
    folder, target = saved
    given = {"quantization_config": FORMS[form](), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    bare = model(input_ids=IDS).logits
    dequantised = unpacked(model)(input_ids=IDS).logits
    error = (dequantised - bare).abs().max()  # int8 kernels round what enters, too
    for name, delta in METHODS.items():
        plan = deltaspec.plan(model, spec(delta, target))
        assert plan == deltaspec.plan(model_from(str(folder)), spec(delta, target)), name
        assert plan.base_parameters == AutoModelForCausalLM.from_config(model.config).num_parameters()
        compiled = deltaspec.compile(model, spec(delta, target))
        assert torch.equal(compiled(input_ids=IDS).logits, bare), name
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in compiled.deltas["d"].parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
            attached, merged = compiled(input_ids=IDS).logits, compiled.merge()
            assert (attached - bare).abs().max() > 1e-3
            assert (merged(input_ids=IDS).logits - attached).abs().max() < 1e-5 + 4 * error, name


def unpacked(model):
    """Return the model with plain linear layers, whose weights are what transformers itself makes of the codes."""
    target = "**.v_proj" if model.config.model_type == "llama" else "**.c_attn"
    compiled = deltaspec.compile(model, spec(METHODS["lora"], target))
    return compiled.merge().eval()


@pytest.mark.parametrize("form", ["nf4", "int8", "torchao int8"])
def test_a_merged_model_is_saved_and_loaded_as_it_is(saved, form, tmp_path):
    folder, target = saved
    given = {"quantization_config": FORMS[form](), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    compiled = deltaspec.compile(model, spec(METHODS["lora"], target))
    nn.init.normal_(next(p for n, p in compiled.deltas["d"].named_parameters() if n.endswith("up")))
    merged = compiled.merge()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(loaded(input_ids=IDS).logits, merged(input_ids=IDS).logits, atol=1e-6)


def test_values_are_those_that_the_libraries_say():
    plain = nn.Linear(64, 64)
    four = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="fp4")
    four.load_state_dict(plain.state_dict())
    four.to("cpu")
    wanted = bitsandbytes.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
    assert torch.equal(values_of(four), wanted) and 0 < (wanted - plain.weight).abs().max() < 0.05
    eight = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    eight.load_state_dict(plain.state_dict())
    eight.to("cpu")
    for _ in range(2):  # the first forward moves its codes elsewhere
        assert (values_of(eight) - plain.weight).abs().max() < 2e-3
        eight(torch.randn(2, 64))


@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_on_codes_is_saved_resumed_and_loaded(saved, form, tmp_path):
    folder, target = saved
    given = {"quantization_config": FORMS[form](), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **given).eval()

    def trained(kind, resume=None):
        compiled = deltaspec.compile(model, spec(METHODS["lora"], target))
        settings = arguments(tmp_path, max_steps=2, save_steps=1, gradient_checkpointing=kind is DeltaTrainer)
        rows = [{"input_ids": IDS[0] + i, "labels": IDS[0] + i} for i in range(8)]
        trainer = kind(model=compiled, args=TrainingArguments(**settings), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, compiled.eval()

    plain, _ = trained(Trainer)
    first, compiled = trained(DeltaTrainer)
    again, _ = trained(DeltaTrainer, str(tmp_path / "checkpoint-1"))
    assert losses(first) == losses(again) == pytest.approx(losses(plain), abs=1e-5)
    first.save_model(str(tmp_path / "end"))
    back = deltaspec.restore(model, tmp_path / "end")
    assert torch.equal(back(input_ids=IDS).logits, compiled(input_ids=IDS).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    deltaspec.restore(plain, tmp_path / "end")  # the same weights, but for rounding
