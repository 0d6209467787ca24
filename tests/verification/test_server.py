"""A server is held to golden answers: one that serves the deltas, one that serves the base, and ones that fail."""

from __future__ import annotations

import golden_set
import pytest
import torch
from completions import serving
from tiny_models import base

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.verification import verify


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return golden_set.save(tmp_path)


def of_deltas(compiled):
    def logits(name, ids):
        with torch.no_grad(), compiled.only(name):
            return compiled(input_ids=ids).logits

    return logits


@torch.no_grad()
def of_base(name, ids):
    return base("llama")(input_ids=ids).logits


NAMES = ("low", "bias")


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/completions"])
def test_a_server_that_serves_the_deltas_agrees(tmp_path, compiled, path):
    with serving(of_deltas(compiled), NAMES) as url:
        found = verify(tmp_path, None, against=url + path)
    assert found and [each.name for each in found] == ["low", "bias"]
    assert all(each.argmax == 1.0 and each.absolute < 1e-5 for each in found)


def test_a_server_that_serves_the_base_is_found_out(tmp_path, compiled):
    with serving(of_base, NAMES) as url:
        found = verify(tmp_path, None, against=url)
        assert [each.verdict for each in found] == ["as without the delta"] * 2
        assert not verify(tmp_path, None, against=url, dtype="bfloat16")


def test_a_server_that_serves_another_delta_differs(tmp_path, compiled):
    def wrong(name, ids):
        return of_deltas(compiled)(NAMES[name == "low"], ids)

    with serving(wrong, NAMES) as url:
        assert not any(each.verdict == "same" for each in verify(tmp_path, None, against=url))


def test_tokens_that_are_told_as_texts_need_a_tokenizer(tmp_path, compiled, monkeypatch):
    import transformers

    class Words:
        def decode(self, ids):
            return f"<{ids[0] // 2}>"  # two tokens a word, as in byte-level vocabularies

    model = base("llama")
    with serving(of_deltas(compiled), NAMES, lambda token: f"<{token // 2}>") as url:
        with pytest.raises(DeltaSpecError, match="nothing says which ids they are"):
            verify(tmp_path, None, against=url)
        monkeypatch.setattr(model.config, "_name_or_path", "org/tiny")
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Words())
        assert verify(tmp_path, model, against=url)


def test_a_server_that_cannot_be_asked_is_one_error(tmp_path, compiled):
    with serving(of_base, ("low",)) as url:
        with pytest.raises(DeltaSpecError, match="says 404 for the model 'bias': .*no model bias") as raised:
            verify(tmp_path, None, against=url)
        assert [finding.code for finding in raised.value.diagnostics] == ["DS553"]
    with pytest.raises(DeltaSpecError, match="cannot be reached"):
        verify(tmp_path, None, against=url)
    with serving(lambda name, ids: torch.zeros(1, 1, 0), NAMES) as url, pytest.raises(DeltaSpecError, match="DS553"):
        verify(tmp_path, None, against=url)


def test_answers_that_are_no_logits_at_each_position_are_refused(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    import deltaspec

    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "full", "target": {"type": "Linear"}}]}
    deltaspec.compile(model, spec).save(tmp_path, golden=torch.ones(2, 4))
    with pytest.raises(DeltaSpecError, match="logits at each position of input_ids"):
        verify(tmp_path, None, against="http://127.0.0.1:1")


@pytest.mark.parametrize("place", ["file:///etc/hosts", "ftp://127.0.0.1/x", "pefd"])
def test_what_is_no_url_of_a_server_is_not_opened(tmp_path, compiled, place):
    with pytest.raises(ValueError, match="against is peft, onnx or a URL"):
        verify(tmp_path, None, against=place)
