"""Configurations from elsewhere: their code is never run, their kernels are never loaded, and nothing is asked."""

import io
import json
import sys
from contextlib import nullcontext

import pytest

from deltaspec.backbone.loading import model_from
from deltaspec.backbone.untrusted import kernel_in, no_questions
from deltaspec.diagnostics.findings import DeltaSpecError

SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
LLAMA, BERT = dict(SIZES, model_type="llama"), dict(SIZES, model_type="bert")
OWN = {"AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel", "AutoConfig": "own.OwnConfig"}
VISION = dict(model_type="clip_vision_model", hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
              intermediate_size=16, image_size=8, patch_size=4, projection_dim=8)  # fmt: skip
CONFIGS = {
    # No model class of transformers has this configuration, so there is only the repository's.
    "own": dict(VISION, auto_map=OWN),
    "vision-encoder-decoder": dict(model_type="vision-encoder-decoder", encoder=VISION,
                                   decoder=dict(VISION, auto_map=OWN), architectures=["VisionEncoderDecoderModel"]),
    "encoder-decoder": dict(model_type="encoder-decoder", encoder=dict(BERT, auto_map=OWN),
                            decoder=dict(VISION, auto_map=OWN), architectures=["EncoderDecoderModel"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stdin", ["yes", "closed"])
def test_code_of_a_repository_is_never_run_nor_asked_for(tmp_path, monkeypatch, capsys, name, stdin):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n") if stdin == "yes" else None)
    with pytest.raises(DeltaSpecError, match="DS322.*model code of its own") if name != "own" else nullcontext():
        model_from("config.json")  # "own" is built by transformers' own class
    assert not (tmp_path / "ran").exists()
    assert sys.stdin is None or sys.stdin.readline() == "y\n"
    captured = capsys.readouterr()
    assert "Do you wish" not in captured.out + captured.err


@pytest.mark.parametrize(
    "spelled",
    [
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "org/kernel@v1:function"},
        {"attn_implementation": "paged|org/kernel"},
        {"experts_implementation": "org/experts"},
        {"_experts_implementation": {"": "org/experts"}},
        {"attn_implementation": {"text_config": "org/kernel", "": "sdpa"}},
        {"text_config": {"model_type": "llama", "_attn_implementation": "org/kernel"}},
        {"parts": [{"attn_implementation": "org/kernel"}]},
        {"_attn_implementation_internal": "org/kernel"},
    ],
)
def test_kernels_by_hub_name_are_refused_in_any_spelling(tmp_path, spelled):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA | spelled))
    with pytest.raises(DeltaSpecError) as caught:
        model_from(str(file))
    (found,) = caught.value.diagnostics
    assert found.code == "DS322" and "of a hub, whose code is never run" in found.message


def test_a_hub_configuration_is_looked_through_as_an_object():
    import transformers

    config = transformers.LlamaConfig(**SIZES, attn_implementation="org/kernel")
    assert kernel_in(config) == "org/kernel"
    nested = transformers.LlavaConfig(text_config=LLAMA, vision_config=VISION, attn_implementation="org/kernel")
    assert kernel_in(nested.text_config) == kernel_in(nested) == "org/kernel"
    assert kernel_in(transformers.LlamaConfig(**SIZES, attn_implementation="sdpa", name_or_path="org/model")) is None


def test_a_factory_reads_no_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asking_factory.py").write_text("def make():\n    return input('which one? ')\n")
    with pytest.raises(DeltaSpecError, match="DS324.*EOFError"):
        model_from("asking_factory:make")
    with no_questions():
        assert sys.stdin.read() == ""
