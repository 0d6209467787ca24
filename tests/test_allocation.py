from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import deltaspec
from deltaspec.allocation import RankAllocator

PARAMS = {"rank": 2, "initial_rank": 4, "alpha": 12.0}
SCHEDULE = {"total_steps": 12, "warmup_steps": 2, "final_steps": 3, "interval": 2}


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def compiled(base: nn.Module) -> deltaspec.CompiledModel:
    entry = {"name": "d", "method": "adalora", "params": PARAMS, "target": ["**.query", "**.value"]}
    return deltaspec.compile(base, {"deltaspec": 1, "deltas": [entry]})


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (8, 6), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def train(c: deltaspec.CompiledModel, allocator: RankAllocator, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss = c(**batch(step)).loss + 0.5 * allocator.orthogonality()
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()


def test_allocates_as_peft_does() -> None:
    base = model()
    c = compiled(base)
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=12,
        total_step=12,
        tinit=2,
        tfinal=3,
        deltaT=2,
        target_modules=["query", "value"],
    )
    other = peft.get_peft_model(copy.deepcopy(base), config)
    layers = {site.fqn: other.base_model.model.get_submodule(site.fqn) for site in c.plan.sites}
    with torch.no_grad():
        for fqn, layer in layers.items():
            # Singular values away from zero: at zero all importances tie, and the two break ties differently.
            c.deltas["d"].tensor(f"{fqn}.singular").fill_(0.3)
            layer.lora_E["default"].fill_(0.3)
            layer.lora_A["default"].copy_(c.deltas["d"].tensor(f"{fqn}.down"))
            layer.lora_B["default"].copy_(c.deltas["d"].tensor(f"{fqn}.up"))
    c.train()
    other.train()
    allocator = RankAllocator(c, "d", **SCHEDULE)
    ours = torch.optim.SGD(c.trainable_parameters(), 0.1)
    theirs = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], 0.1)
    assert allocator.initial_budget == other.base_model.rankallocator.init_bgt == 16
    dropped = []
    for step in range(12):
        train(c, allocator, ours, range(step, step + 1))
        other.base_model(**batch(step)).loss.backward()  # PeftModel itself leaves the orthogonality term out
        theirs.step()
        other.base_model.update_and_allocate(step + 1)
        theirs.zero_grad()
        assert allocator.budget(step + 1) == other.base_model.rankallocator.budget_schedule(step + 1)[0]
        for fqn, layer in layers.items():
            for name, held in (("down", layer.lora_A), ("singular", layer.lora_E), ("up", layer.lora_B)):
                mine = c.deltas["d"].tensor(f"{fqn}.{name}")
                torch.testing.assert_close(mine, held["default"].reshape(mine.shape), atol=1e-5, rtol=1e-4)
        dropped.append(sum(allocator.ranks.values()))
    assert [dropped[i] for i in (2, 3, 5, 7, 8, 11)] == [16, 10, 8, 8, 8, 8]  # even steps drop; the last ones all do


def test_ranks_move_to_where_they_are_needed_and_stay() -> None:
    c = compiled(model())
    allocator = RankAllocator(c, "d", **SCHEDULE)
    shapes = {n: p.shape for n, p in c.deltas["d"].named_parameters()}
    optimizer = torch.optim.Adam(c.trainable_parameters(), 1e-2)
    train(c, allocator, optimizer, range(9))
    chosen = allocator.ranks
    assert sum(chosen.values()) == allocator.target_budget == 8 and len(set(chosen.values())) > 1
    train(c, allocator, optimizer, range(9, 12))  # Adam's momentum would bring dropped ranks back
    assert allocator.ranks == chosen
    assert {n: p.shape for n, p in c.deltas["d"].named_parameters()} == shapes


def test_resumes(tmp_path: Any) -> None:
    whole, half = compiled(model()), compiled(model())
    allocators = [RankAllocator(c, "d", **SCHEDULE) for c in (whole, half)]
    for c, allocator in zip((whole, half), allocators, strict=True):
        train(c, allocator, torch.optim.SGD(c.trainable_parameters(), 0.1), range(6))
    torch.save(allocators[1].state_dict(), tmp_path / "allocator.pt")
    half.save(tmp_path / "deltas")
    again = compiled(model()).load(tmp_path / "deltas")
    resumed = RankAllocator(again, "d", **SCHEDULE)
    resumed.load_state_dict(torch.load(tmp_path / "allocator.pt"))
    for c, allocator in ((whole, allocators[0]), (again, resumed)):
        train(c, allocator, torch.optim.SGD(c.trainable_parameters(), 0.1), range(6, 12))
    for name, value in whole.deltas["d"].named_parameters():
        assert torch.equal(value, dict(again.deltas["d"].named_parameters())[name])


def test_callback_drives_it_under_trainer(tmp_path: Any) -> None:
    c = compiled(model())
    allocator = RankAllocator(c, "d", warmup_steps=1, final_steps=2)
    rows = [{k: v[i] for k, v in batch(0).items()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    before = allocator.orthogonality().item()
    Trainer(model=c.backbone, args=arguments, train_dataset=rows, callbacks=[allocator.callback()]).train()
    assert allocator.steps == allocator.total_steps == 6
    assert sum(allocator.ranks.values()) == allocator.target_budget
    assert allocator.orthogonality().item() < before


def test_orthogonality_is_peft_term() -> None:
    c = compiled(model())
    total, count = torch.zeros(()), 0
    for name, value in c.deltas["d"].named_parameters():
        if name.endswith(("down", "up")):
            covariance = value @ value.T if name.endswith("down") else value.T @ value
            total = total + torch.norm(covariance - torch.eye(4), p="fro")
            count += 1
    torch.testing.assert_close(RankAllocator(c, "d").orthogonality(), total / count)


def test_mistakes_are_told() -> None:
    c = compiled(model())
    with pytest.raises(ValueError, match="'e' is no adalora delta of this model; those are \\['d'\\]"):
        RankAllocator(c, "e")
    with pytest.raises(ValueError, match="leave none of 5"):
        RankAllocator(c, "d", total_steps=5, warmup_steps=3, final_steps=2)
    with pytest.raises(ValueError, match="interval"):
        RankAllocator(c, "d", interval=0)
    with pytest.raises(ValueError, match="decays"):
        RankAllocator(c, "d", sensitivity_decay=1.0)
    with pytest.raises(ValueError, match="pass total_steps"):
        RankAllocator(c, "d").step()
    with pytest.raises(ValueError, match="after backward"):
        RankAllocator(c, "d", total_steps=5).step()


def test_ranks_move_between_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    moe = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    target = [{"parameter": "**.experts.*_proj"}, "**.q_proj"]
    entry = {"name": "d", "method": "adalora", "params": PARAMS, "target": target}
    c = deltaspec.compile(MixtralForCausalLM(MixtralConfig(**sizes, **moe)), {"deltaspec": 1, "deltas": [entry]})
    allocator = RankAllocator(c, "d", **SCHEDULE)
    assert (allocator.initial_budget, allocator.target_budget) == (9 * 4, 9 * 2)
    optimizer = torch.optim.Adam(c.trainable_parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        ids = torch.randint(8, (4, 6), generator=generator)
        (c(input_ids=ids, labels=ids).loss + 0.5 * allocator.orthogonality()).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    experts = [f"model.layers.0.mlp.experts.{p}_proj[{i}]" for p in ("down", "gate_up") for i in range(4)]
    assert sorted(allocator.ranks) == sorted([*experts, "model.layers.0.self_attn.q_proj"])
    assert sum(allocator.ranks.values()) == 18 and len(set(allocator.ranks.values())) > 1
    singular = c.deltas["d"].tensor("model.layers.0.mlp.experts.down_proj.singular")
    assert singular.shape == (4, 4)
    assert singular.count_nonzero(1).tolist() == [allocator.ranks[name] for name in experts[:4]]


def test_orthogonality_is_the_mean_over_the_matrices_of_a_stack() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->beo", x, self.weight)

    entry = {"name": "d", "method": "adalora", "params": PARAMS, "target": {"parameter": "weight"}}
    c = deltaspec.compile(Experts(), {"deltaspec": 1, "deltas": [entry]}, example_inputs=torch.ones(2, 6))
    down, up = (c.deltas["d"].tensor(f"weight.{name}") for name in ("down", "up"))
    identity = torch.eye(4)
    expected = [(m @ m.t() - identity).norm() for a, b in zip(down, up, strict=True) for m in (a, b.t())]
    torch.testing.assert_close(RankAllocator(c, "d").orthogonality(), torch.stack(expected).mean())
