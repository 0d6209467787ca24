"""The end of a prompt while text is generated: known through whatever calls `generate`, and not mixed up.

A model's `generate` is wrapped in its `__dict__`, since nothing that it passes to a forward says that it runs. These
tests say what that must not break: loops of one's own, generations inside of others, threads, copies, pickles, models
with a `generate` of their own.
"""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from prompt_models import build, gpt2, llama, tokens
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

SPEC = {"deltaspec": 1, "deltas": [{"name": "d", "method": "reft", "params": {"rank": 3, "last": 2}}]}
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
IDS = tokens(2, 6)


def compiled(make=llama):
    c = deltaspec.compile(build(make), SPEC)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in c.deltas["d"].parameters():
            parameter.normal_(0, 0.5)
    return c


def refused(run):
    with pytest.raises(DeltaSpecError, match=r"DS450[\s\S]*c.generate"):
        run(input_ids=IDS, use_cache=False, **SETTINGS)


class Asks(LogitsProcessor):
    """Has something else run in the middle of a generation."""

    def __init__(self, ask):
        self.ask, self.heard = ask, []

    def __call__(self, input_ids, scores):
        self.heard.append(self.ask())
        return scores


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_generate_that_nothing_remembers_is_refused_however_it_is_asked_for_no_cache(make):
    c = compiled(make)
    refused(c.backbone.generate)
    refused(c.view().backbone.generate)
    refused(copy.deepcopy(c).backbone.generate)
    with pytest.raises(DeltaSpecError, match="DS450"):
        c.backbone.generate(IDS, GenerationConfig(use_cache=False, **SETTINGS))
    c.backbone.generation_config.use_cache = False
    with pytest.raises(DeltaSpecError, match="DS450"):
        c.backbone.generate(IDS, **SETTINGS)
    assert torch.equal(c.backbone.generate(IDS, use_cache=True, **SETTINGS), c.generate(IDS, **SETTINGS))


def test_a_loop_of_ones_own_brings_a_prompt_in_each_forward():
    c = compiled()
    first = c(input_ids=IDS[:, :4], use_cache=False).logits
    c.generate(input_ids=IDS, use_cache=False, **SETTINGS)
    refused(c.backbone.generate)
    with torch.no_grad():
        torch.testing.assert_close(c(input_ids=IDS[:, :4], use_cache=False).logits, first)
        longer = c(input_ids=IDS, use_cache=False).logits
        assert not torch.allclose(longer[:, :4], first)  # the last tokens of this prompt are others


@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_inside_of_another_has_a_prompt_of_its_own(cached):
    c, other = compiled(), compiled(gpt2)
    expected, inner = c.generate(IDS, **SETTINGS), other.generate(IDS[:, :3], **SETTINGS)
    asks = Asks(lambda: other.generate(IDS[:, :3], use_cache=cached, **SETTINGS))
    got = c.generate(IDS, use_cache=False, logits_processor=LogitsProcessorList([asks]), **SETTINGS)
    assert torch.equal(got, expected)
    assert all(torch.equal(heard, inner) for heard in asks.heard)
    again = Asks(lambda: refused(c.backbone.generate))  # the outer one's prompt is not that of the inner one
    c.generate(IDS, use_cache=False, logits_processor=LogitsProcessorList([again]), **SETTINGS)
    assert len(again.heard) == SETTINGS["max_new_tokens"]


def test_threads_do_not_see_each_others_prompts():
    c = compiled()
    expected = [c.generate(IDS[:, :n], **SETTINGS) for n in (3, 4, 6)]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(c.generate, IDS[:, :n], use_cache=False, **SETTINGS) for n in (3, 4, 6)]
        refusal = pool.submit(refused, c.backbone.generate)
    assert all(torch.equal(f.result(), e) for f, e in zip(futures, expected, strict=True))
    refusal.result()


def test_watching_shows_in_no_signature_and_leaves_with_a_plain_model():
    model = build(llama)
    c = deltaspec.compile(model, SPEC)
    assert inspect.signature(c.backbone.generate) == inspect.signature(model.generate)
    assert "generate" not in model.__dict__
    refused(pickle.loads(pickle.dumps(c)).backbone.generate)
    bias = {"deltaspec": 1, "deltas": [{"name": "b", "method": "bitfit", "target": {"role": "norm"}}]}
    merged = deltaspec.compile(build(gpt2), bias).merge()
    assert "generate" not in merged.__dict__


def test_a_models_own_generate_runs_and_comes_back():
    model = build(llama)

    def own(self, *args, **kwargs):
        return "own", type(self).generate(self, *args, **kwargs)

    model.generate = MethodType(own, model)
    c = deltaspec.compile(model, SPEC)
    refused(c.backbone.generate)
    says, ids = c.generate(IDS, use_cache=False, **SETTINGS)
    assert says == "own" and torch.equal(ids, c.generate(IDS, **SETTINGS)[1])
    assert model.generate.__func__ is own
