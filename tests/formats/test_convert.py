"""`deltaspec convert`, and the other ways in for an adapter that PEFT wrote: load, a library, a hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from beside_peft import moved, saved
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import deltaspec
from deltaspec.cli import main
from deltaspec.diagnostics.findings import DeltaSpecError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
_PT = {"format": "pt"}
"""What PEFT writes into its files: adapters alike have the same header."""
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30))
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def adapter(llama: Any, folder: Path, seed: int = 0, **options: Any) -> Tensor:
    made = moved(llama, peft.LoraConfig(**(QV | options)), seed)
    saved(made, folder)
    return logits(made).detach()


def converted(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    return result.exit_code, result.output


def codes(action: Any, *arguments: Any) -> set[str]:
    with pytest.raises(DeltaSpecError) as caught:
        action(*arguments)
    return {finding.code for finding in caught.value.diagnostics}


def test_the_spec_is_as_a_person_writes_it_and_its_lock_holds(llama: Any, base: Path, tmp_path: Path) -> None:
    wanted = adapter(llama, tmp_path / "french", rank_pattern={"v_proj": 2}, layers_to_transform=[0, 2])
    status, said = converted(tmp_path / "french", "-o", tmp_path / "out")
    assert status == 0, said
    assert "8 tensors of the adapter, all accounted for" in said
    spec = tmp_path / "out" / "french.deltaspec.yaml"
    assert yaml.safe_load(spec.read_text())["deltas"] == [
        {
            "name": "french",
            "method": "lora",
            "params": {"rank": 4, "alpha": 8.0},
            "target": {"role": ["attn.q", "attn.v"], "layers": [0, 2]},
            "overrides": [{"match": {"role": "attn.v"}, "params": {"rank": 2}}],
            "expect": {"sites": 4},
        }
    ]
    assert CliRunner().invoke(main, ["plan", str(base), str(spec), "--check"]).exit_code == 0
    assert torch.equal(logits(deltaspec.restore(llama, tmp_path / "out")), wanted)
    assert torch.equal(logits(deltaspec.compile(llama, spec).load(tmp_path / "french")), wanted)


def test_weights_are_read_where_a_delta_keeps_something_of_them(llama: Any, tmp_path: Path) -> None:
    wanted = adapter(llama, tmp_path / "dora", use_dora=True)
    status, said = converted(tmp_path / "dora", "-o", tmp_path / "out")
    assert status == 0, said
    torch.testing.assert_close(logits(deltaspec.restore(llama, tmp_path / "out")), wanted, atol=1e-5, rtol=1e-5)


def test_the_class_and_labels_of_the_task(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=30, num_labels=5)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.bert.save_pretrained(tmp_path / "base")  # the base has no head, and two labels
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    made = moved(model, peft.LoraConfig(task_type="SEQ_CLS"))
    status, said = converted(saved(made, tmp_path / "topics"), "-o", tmp_path / "out")
    assert status == 0, said
    assert torch.equal(logits(deltaspec.restore(model, tmp_path / "out")), logits(made))


def test_a_library_of_both_kinds(llama: Any, tmp_path: Path) -> None:
    wanted = {name: adapter(llama, tmp_path / "all" / name, seed) for seed, name in enumerate(("de", "fr", "nl"))}
    assert converted(tmp_path / "all" / "nl", "-o", tmp_path / "all" / "ours", "--name", "ours")[0] == 0
    compiled = deltaspec.compile(llama, {"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit"}]})
    compiled.detach()
    library = compiled.library(tmp_path / "all")
    assert library.names == ("de", "fr", "nl", "ours")
    for name, expected in {**wanted, "ours": wanted["nl"]}.items():
        with compiled.only(name):
            assert torch.equal(logits(compiled), expected)
    mixed = compiled(input_ids=IDS.repeat(3, 1), deltas=["nl", None, "de"]).logits
    rows = torch.cat([wanted["nl"], logits(llama), wanted["de"]])
    torch.testing.assert_close(mixed, rows, atol=1e-6, rtol=1e-5)


def test_one_of_many_alike_is_damaged(llama: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("de", "fr")):
        adapter(llama, tmp_path / name, seed)
    _infinite(tmp_path / "fr")
    library = deltaspec.compile(llama, {"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit"}]}).library(
        tmp_path
    )
    library.load("de")
    assert codes(library.load, "fr") == {"DS527"}


def test_adapters_of_a_model_with_another_prefix(llama: Any, tmp_path: Path) -> None:
    adapter(llama, tmp_path / "french")
    inner = deltaspec.restore(llama.model, tmp_path / "french")
    outer = deltaspec.restore(llama, tmp_path / "french").backbone.model
    assert torch.equal(inner(input_ids=IDS).last_hidden_state, outer(input_ids=IDS).last_hidden_state)


def test_wrapped_prefixes_and_pickles_of_tensors(llama: Any, tmp_path: Path) -> None:
    wanted = adapter(llama, tmp_path / "french")
    file = tmp_path / "french" / "adapter_model.safetensors"
    tensors = {k.replace(".model.layers", "._orig_mod.model.layers"): v for k, v in load_file(file).items()}
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    assert torch.equal(logits(deltaspec.restore(llama, tmp_path / "french")), wanted)


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lacking(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)


def _surplus(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_tail.lora_A.weight": torch.ones(4, 16)}, file)


def _misfit(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file(tensors | {key: tensors[key][:-1].clone()}, file)


def _infinite(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {key: value * torch.inf for key, value in list(tensors.items())[:1]}, file, _PT)


def _hostile(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "executed",)

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")


def _option(**options: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return change


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_cut, "DS522"),
        (_lacking, "DS543"),
        (_surplus, "DS523"),
        (_misfit, "DS526"),
        (_infinite, "DS527"),
        (_hostile, "DS522"),
        (_option(peft_type="LOLA"), "DS545"),
        (_option(shiny_new_thing=3), "DS544"),
        (_option(target_modules=["q_proj"]), "DS543"),
        (_option(target_modules=["q_proj", "v_proj", "o_proj"]), "DS543"),
        (_option(target_modules="(q_proj"), "DS544"),
        (_option(r=8), "DS543"),
        (_option(kasa_config={"beta": 1}), "DS544"),
    ],
)
def test_bad_input(llama: Any, base: Path, tmp_path: Path, damage: Any, code: str) -> None:
    adapter(llama, tmp_path / "french")
    damage(tmp_path / "french")
    assert code in codes(deltaspec.restore, llama, tmp_path / "french")
    status, said = converted(tmp_path / "french", "-o", tmp_path / "out")
    assert status == 1, said
    assert f"error[{code}]" in said
    assert "  = help: " in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "french" / "executed").exists()


def test_a_folder_of_adapters_is_not_one(llama: Any, tmp_path: Path) -> None:
    adapter(llama, tmp_path / "all" / "de")
    assert codes(deltaspec.restore, llama, tmp_path / "all") == {"DS540"}
    assert codes(deltaspec.restore, llama, tmp_path) == {"DS521"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve a folder of repositories as a hub does, on loopback: the tree of a revision, and its files."""
    root = tmp_path / "hub"

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and (repo := root / "/".join(parts[2:4])).is_dir():
                files = sorted(path for path in repo.rglob("*") if path.is_file())
                if parts[4:5] == ["tree"]:
                    listed = [
                        {"type": "file", "path": str(f.relative_to(repo)), "size": f.stat().st_size, "oid": "0" * 40}
                        for f in files
                    ]
                    return self._answer(listed)
                siblings = [{"rfilename": str(file.relative_to(repo))} for file in files]
                return self._answer({"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": siblings})
            if parts[2:3] == ["resolve"] and (file := root.joinpath(*parts[:2], *parts[4:])).is_file():
                return self._answer(file.read_bytes())
            self.send_error(404)
            return None

        do_HEAD = do_GET

        def _answer(self, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"' + str(len(body)) * 8 + '"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import snapshot_download

    address = f"http://127.0.0.1:{server.server_port}"
    fetched = partial(snapshot_download, endpoint=address, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    yield root
    server.shutdown()


def test_a_hub_id_with_a_folder_and_a_revision(llama: Any, hub: Path, tmp_path: Path) -> None:
    first = adapter(llama, hub / "ann" / "french")
    second = adapter(llama, hub / "ann" / "many" / "nl", seed=1)
    assert torch.equal(logits(deltaspec.restore(llama, "ann/french")), first)
    assert torch.equal(logits(deltaspec.restore(llama, "ann/many/nl@v1.0")), second)
    assert converted("ann/french", "-o", tmp_path / "out")[0] == 0
    assert codes(deltaspec.restore, llama, "ann/none") == {"DS521"}


def test_dropouts_of_training_do_not_count(llama: Any, tmp_path: Path) -> None:
    made = moved(llama, peft.LoHaConfig(r=2, target_modules=["q_proj"], rank_dropout=0.1))
    saved(made, tmp_path / "loha")
    delta = {"name": "d", "method": "loha", "params": {"rank": 2, "alpha": 8.0}, "target": {"role": "attn.q"}}
    compiled = deltaspec.compile(llama, {"deltaspec": 1, "deltas": [delta]}).load(tmp_path / "loha")
    torch.testing.assert_close(logits(compiled), logits(made), atol=1e-5, rtol=1e-5)


def test_an_expression_that_takes_too_long_is_a_finding(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(llama, tmp_path / "lora", rank_pattern={"(?:[a-z]|[a-z_]+)+q": 4})
    monkeypatch.setattr("deltaspec.names.patterns.MATCH_SECONDS", 1e-9)
    assert codes(deltaspec.restore, llama, tmp_path / "lora") == {"DS544"}
