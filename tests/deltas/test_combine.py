"""Derived deltas: PEFT's `add_weighted_adapter` on the same tensors; when they are computed; files, plan, documents."""

import copy
import pickle

import pytest
import torch
from models import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import deltaspec
from deltaspec.deltas.initial import seeded
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods
from deltaspec.planning.lock import check_lock, lock, lock_data
from deltaspec.planning.resolve import plan

X = torch.linspace(-1, 1, 3 * 8).reshape(3, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(torch.relu(self.wide(x)))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


PEFT_CASES = {
    "bert": (ARCHITECTURES["bert"].model, ["query", "value"]),
    "gpt2": (gpt2, ["c_attn", "wte"]),
    "pixels": (Pixels, ["wide", "one"]),
}


def spec(combine="linear", params=None, source=None, weights=None, method="lora", target="*", **blend):
    """Two sources of one method and one delta derived from them, which starts attached alone."""
    deltas = [
        {
            "name": name,
            "method": method,
            "params": {"rank": 3} if source is None else source,
            "target": target,
            "attached": False,
        }
        for name in ("french", "legal")
    ]
    weights = {"french": 0.7, "legal": -0.3} if weights is None else weights
    derived = {"name": "blend", "from": weights, "combine": combine, **blend}
    return {"deltaspec": 1, "deltas": [*deltas, {**derived, "params": params} if params else derived]}


def train(compiled, *names, seed=0):
    """Return deltas random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for parameter in compiled.deltas[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def compiled_blend(model=None, **options):
    compiled = deltaspec.compile((model or Net()).eval(), spec(**options))
    train(compiled, "french", "legal")
    return compiled.attach("blend")


def tensors(compiled, name="blend"):
    return {key: value.clone() for key, value in compiled.deltas[name].tensors()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# PEFT


def peft_factors(module, name):
    if name in module.lora_A:
        return module.lora_A[name].weight, module.lora_B[name].weight
    return module.lora_embedding_A[name], module.lora_embedding_B[name]


def peft_blend(monkeypatch, model, targets, compiled, combine, weights, options, ranks):
    """Copy the sources into PEFT, let it combine them; give fqn -> (A, B, scale, update of the weight)."""
    configs = {
        name: LoraConfig(r=rank, lora_alpha=16, target_modules=targets, use_rslora=name == "legal")
        for name, rank in ranks.items()
    }
    peft = get_peft_model(copy.deepcopy(model), configs["french"], adapter_name="french")
    peft.add_adapter("legal", configs["legal"])
    sites = {fqn: module for fqn, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        for name in ranks:
            held = dict(compiled.deltas[name].tensors())
            for fqn, module in sites.items():
                a, b = peft_factors(module, name)
                a.copy_(held[f"{fqn}.down"])
                b.copy_(held[f"{fqn}.up"])
    names = {id(module): fqn for fqn, module in sites.items()}
    kind = type(peft.base_model)
    original = kind._generalized_task_arithmetic_weighted_adapter

    def same_draws(self, combination, adapters, weights, target, *rest):
        seed = options.get("seed", 0)
        torch.random.default_generator.set_state(seeded(f"{seed}\0blend\0{names[id(target)]}").get_state())
        return original(self, combination, adapters, weights, target, *rest)

    monkeypatch.setattr(kind, "_generalized_task_arithmetic_weighted_adapter", same_draws)
    theirs = {"majority_sign": "majority_sign_method", "rank": "svd_rank"}
    given = {theirs.get(key, key): value for key, value in options.items() if key != "seed"}
    peft.base_model.add_weighted_adapter(list(weights), list(weights.values()), "blend", combine, **given)
    return {
        fqn: (*peft_factors(m, "blend"), m.scaling["blend"], m.get_delta_weight("blend")) for fqn, m in sites.items()
    }


@pytest.mark.parametrize("model", PEFT_CASES)
@pytest.mark.parametrize(
    ("combine", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.6, "majority_sign": "frequency"}),
        ("ties", {"density": 1.0}),
        ("dare_linear", {"density": 0.5, "seed": 7}),
        ("dare_ties", {"density": 0.5, "majority_sign": "frequency"}),
    ],
)
def test_peft_combines_the_same_tensors_to_the_same(monkeypatch, model, combine, options):
    build, targets = PEFT_CASES[model]
    torch.manual_seed(0)
    backbone = build().eval()
    ranks = {"french": 4, "legal": 3 if combine in ("cat", "svd") else 4}
    weights = {"french": 0.7, "legal": -0.3}
    data = spec(combine, options, weights=weights, target=[f"**.{name}" for name in targets])
    for entry in data["deltas"][:2]:
        scaling = "rslora" if entry["name"] == "legal" else "standard"
        entry["params"] = {"rank": ranks[entry["name"]], "alpha": 16, "scaling": scaling}
    compiled = deltaspec.compile(backbone, data)
    train(compiled, "french", "legal")
    compiled.refresh()
    expected = peft_blend(monkeypatch, backbone, targets, compiled, combine, weights, options, ranks)
    held, merged = tensors(compiled), compiled.merge("blend")
    assert len(held) == 2 * len(expected) > 0
    for fqn, (a, b, scale, update) in expected.items():
        assert scale == 1
        if combine != "svd":  # the factors of a decomposition are free in their signs
            torch.testing.assert_close(held[f"{fqn}.down"], a, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(held[f"{fqn}.up"], b, atol=1e-6, rtol=1e-5)
        assert held[f"{fqn}.down"].shape == a.shape
        change = merged.get_submodule(fqn).weight - backbone.get_submodule(fqn).weight
        torch.testing.assert_close(change, update, atol=1e-5, rtol=1e-4)


# Sums


def updates(compiled, backbone, name):
    merged = compiled.merge(name)
    return {fqn: merged.get_submodule(fqn).weight - backbone.get_submodule(fqn).weight for fqn in ("a", "b")}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("lora", {"rank": 2, "use_dora": True}),
        ("lora", {"rank": 2, "init": "pissa"}),
        ("vera", {"rank": 4}),
        ("loha", {"rank": 2}),
        ("lokr", {"rank": 2}),
        ("hira", {"rank": 2}),
        ("adalora", {"rank": 2, "initial_rank": 3}),
        ("miss", {"rank": 2}),
        ("oft", {"block_size": 2}),
        ("hra", {"rank": 2}),
        ("fourierft", {"frequencies": 10}),
        ("c3a", {"block_size": 2}),
    ],
)
def test_svd_sums_what_any_method_adds_to_the_weight(method, params):
    torch.manual_seed(1)
    backbone = Net().eval()
    compiled = compiled_blend(backbone, combine="svd", params={"rank": 8}, method=method, source=params)
    french, legal, blend = (updates(compiled, backbone, name) for name in ("french", "legal", "blend"))
    for fqn in blend:
        assert french[fqn].abs().max() > 1e-3
        torch.testing.assert_close(blend[fqn], 0.7 * french[fqn] - 0.3 * legal[fqn], atol=1e-5, rtol=1e-4)
    assert {s.fqn: s.params.rank for s in compiled.plan["blend"].sites} == {"a": 6, "b": 6}  # all that there is


def test_svd_is_the_best_of_its_rank_and_pads_a_sum_of_lower_rank():
    torch.manual_seed(2)
    backbone = Net().eval()
    compiled = compiled_blend(backbone, combine="svd", params={"rank": 2})
    whole = {fqn: 0.7 * v for fqn, v in updates(compiled, backbone, "french").items()}
    for fqn, value in updates(compiled, backbone, "legal").items():
        u, s, v = torch.linalg.svd(whole[fqn] - 0.3 * value, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close(updates(compiled, backbone, "blend")[fqn], best, atol=1e-5, rtol=1e-4)
    low = compiled_blend(backbone, combine="svd", params={"rank": 5}, source={"rank": 1})
    for key, value in tensors(low).items():
        assert 5 in value.shape
        assert torch.linalg.matrix_rank(value) == 2, key
        assert torch.isfinite(value).all()


def test_sources_may_be_derived_and_come_later():
    backbone, data = Net().eval(), spec("cat", weights={"half": 2.0})
    data["deltas"].append({"name": "half", "from": {"french": 0.5, "legal": 0.5}, "combine": "cat", "attached": False})
    compiled = deltaspec.compile(backbone, data)
    assert [d.name for d in compiled.plan.deltas] == ["french", "legal", "blend", "half"]
    train(compiled, "french", "legal")
    compiled.only("blend")  # what is between counts as its own sources are now, though it is detached
    direct = compiled_blend(backbone, combine="cat", weights={"french": 1.0, "legal": 1.0})
    torch.testing.assert_close(compiled(X), direct(X), atol=1e-6, rtol=1e-5)
    assert not torch.equal(compiled(X), backbone(X))


def test_long_chains_and_many_ways_cost_no_more_than_their_length():
    deltas = spec(target="a")["deltas"][:2]
    names = ("french", "legal")
    for number in range(600):
        following = (f"x{number}", f"y{number}")
        deltas += [{"name": n, "from": dict.fromkeys(names, 0.5), "combine": "linear"} for n in following]
        names = following
    made = plan(Net(), {"deltaspec": 1, "deltas": deltas})
    assert len(made.deltas) == 1202
    compiled = deltaspec.compile(Net().eval(), {"deltaspec": 1, "deltas": deltas[:120]})
    compiled.only("x58")
    assert torch.isfinite(compiled(X)).all()


# When


def test_a_fresh_derived_delta_changes_nothing_and_trains_nothing():
    backbone = Net().eval()
    compiled = deltaspec.compile(backbone, spec("ties", {"density": 0.5}))
    assert compiled.attached == ("blend",)
    assert torch.equal(compiled(X), backbone(X))
    assert list(compiled.trainable_parameters()) == list(compiled.deltas["blend"].parameters()) == []
    assert compiled.plan["blend"].trainable == 0
    compiled.attach("french")
    assert {id(p) for p in compiled.trainable_parameters()} == {id(p) for p in compiled.deltas["french"].parameters()}


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_it_is_computed_at_attach_only_refresh_and_the_end_of_a_with(capture):
    compiled = deltaspec.compile(Net().eval(), spec(), capture=capture)
    seen = [compiled(X)]

    def changed():
        seen.append(compiled(X))
        return not torch.equal(seen[-1], seen[-2])

    train(compiled, "french", "legal")
    assert not changed()  # attached: as it was
    compiled.refresh("blend")
    assert changed()
    train(compiled, "french")
    compiled.only("blend")
    assert changed()
    train(compiled, "legal")
    compiled.attach("legal")
    compiled.detach("legal")
    assert not changed()  # it stayed attached, and was not named
    compiled.attach("blend")
    assert changed()
    with compiled.only("french"):
        train(compiled, "french")
    assert changed()
    compiled.detach()
    train(compiled, "french")
    before = tensors(compiled)
    compiled.attach()
    assert not equal(before, tensors(compiled))
    assert compiled.refresh() is compiled
    with pytest.raises(KeyError, match="blend"):
        compiled.refresh("blent")


def test_a_gradient_step_on_a_source_shows_at_the_next_attach():
    compiled = compiled_blend()
    before = compiled(X)
    with compiled.only("french"):
        optimizer = torch.optim.SGD(compiled.trainable_parameters(), lr=0.1)
        compiled(X).square().sum().backward()
        optimizer.step()
    assert not torch.equal(compiled(X), before)
    assert all(not value.requires_grad for value in tensors(compiled).values())


def test_dare_draws_by_seed_name_and_site_alone():
    options = {"combine": "dare_linear", "source": {"rank": 4}}
    one = compiled_blend(Net(), params={"density": 0.5}, **options)
    state = torch.random.get_rng_state()
    assert equal(tensors(one), tensors(one.refresh()))
    assert torch.equal(state, torch.random.get_rng_state())
    other = deltaspec.compile(Net().eval(), spec(params={"density": 0.5, "seed": 1}, **options))
    for name in ("french", "legal"):
        for key, value in other.deltas[name].tensors():
            value.data.copy_(one.deltas[name].tensor(key))
    assert not equal(tensors(one), tensors(other.refresh()))


def test_a_source_that_is_not_finite_is_reported_and_nothing_changes():
    compiled = compiled_blend(combine="svd")
    compiled.detach()
    before = tensors(compiled)
    next(compiled.deltas["french"].parameters()).data[:] = float("nan")
    with pytest.raises(DeltaSpecError, match=r"DS520.*the sources of a have NaN"):
        compiled.attach()
    assert compiled.attached == () and equal(before, tensors(compiled))


# Files and other forms


def test_save_restore_load(tmp_path):
    backbone = Net().eval()
    compiled = compiled_blend(backbone, combine="svd")
    expected = compiled(X)
    compiled.save(tmp_path)
    again = deltaspec.restore(backbone, tmp_path)
    assert again.attached == ("blend",) and again.plan == compiled.plan
    assert torch.equal(again(X), expected) and equal(tensors(again), tensors(compiled))
    other = deltaspec.compile(backbone, spec("svd"))
    assert torch.equal(other.load(tmp_path)(X), expected)
    train(again, "french")
    again.only("blend")
    assert not torch.equal(again(X), expected)


def test_what_is_saved_agrees_with_its_sources(tmp_path):
    compiled = compiled_blend()
    train(compiled, "french")
    with pytest.raises(DeltaSpecError, match=r"DS528.*\n.*c.refresh\('blend'\)"):
        compiled.save(tmp_path)
    assert not list(tmp_path.iterdir())
    compiled.refresh("blend").save(tmp_path)
    compiled.detach()
    train(compiled, "legal")
    compiled.save(tmp_path)  # detached: computed on the way
    again = deltaspec.restore(compiled.merge(), tmp_path)
    assert again.attached == ()
    assert equal(tensors(again), tensors(compiled.refresh()))


def test_several_specs_on_one_backbone_are_saved_and_restored(tmp_path):
    backbone = Net().eval()
    plain = {"deltaspec": 1, "deltas": [{"name": "first", "method": "lora", "params": {"rank": 2}, "target": "a"}]}
    compiled = deltaspec.compile(backbone, plain, spec("cat"))
    train(compiled, "first", "french", "legal")
    compiled.attach("blend").save(tmp_path)
    again = deltaspec.restore(backbone, tmp_path)
    assert again.plan == compiled.plan and len(again.plan.specs) == 2
    assert torch.equal(again(X), compiled(X))


def test_merge_copy_pickle_and_simplified():
    compiled = compiled_blend(combine="ties", params={"density": 0.5})
    torch.testing.assert_close(compiled.merge()(X), compiled(X), atol=1e-6, rtol=1e-5)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)), compiled.simplified()):
        assert torch.equal(twin(X), compiled(X))
        train(twin, "french")
        assert not torch.equal(twin.refresh()(X), compiled(X))
    compiled.detach()
    train(compiled, "french")
    merged = compiled.merge("blend")(X)  # detached: computed on the way
    torch.testing.assert_close(merged, compiled.attach("blend")(X), atol=1e-6, rtol=1e-5)


def test_half_precision_and_meta():
    compiled = compiled_blend(Net().to(torch.bfloat16), combine="svd")
    assert compiled(X.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = deltaspec.compile(Net().eval(), spec("svd"))
    assert all(value.is_meta for value in tensors(empty.refresh()).values())


# The plan


def test_the_plan_and_the_lock_say_what_it_is_built_from(tmp_path):
    made = plan(Net(), spec("ties", {"density": 0.5}, attached=False))
    text = "blend: derived from french × 0.7, legal × -0.3; combine=ties density=0.5 majority_sign=total"
    assert f"{text} (starts detached)" in " ".join(str(made).split())
    assert "2 sites, 0 trainable parameters" in str(made)
    assert "1 × down [3, 8] (buffer), up [6, 3] (buffer) = 0" in str(made)
    locked = lock_data(made)["deltas"]["blend"]
    params = {"density": 0.5, "majority_sign": "total"}
    assert locked["derived"] == {"from": {"french": 0.7, "legal": -0.3}, "combine": "ties", "params": params}
    path = tmp_path / "d.lock.json"
    path.write_text(lock(made), encoding="utf-8")
    assert check_lock(plan(Net(), spec("ties", {"density": 0.5}, attached=False)), path) == []
    other = plan(Net(), spec("ties", {"density": 0.6}, attached=False))
    assert other.fingerprint != made.fingerprint
    assert "DS514" in {found.code for found in check_lock(other, path)}


def test_it_says_so_where_it_would_add_to_its_sources():
    data = spec()
    assert plan(Net(), data).deltas[2].notes == ()
    data["deltas"][0]["attached"] = True
    assert "starts attached beside french, which it is built from" in str(plan(Net(), data))


def test_ranks_by_site():
    data = spec("cat", weights={"legal": 1, "french": 1})
    data["deltas"][0]["overrides"] = [{"match": "b", "params": {"rank": 1}}]
    assert [s.params.rank for s in plan(Net(), data).deltas[2].sites] == [6, 4]
    data["deltas"][2]["combine"] = "svd"
    assert [s.params.rank for s in plan(Net(), data).deltas[2].sites] == [3, 3]
    data["deltas"][2]["combine"] = "linear"
    with pytest.raises(DeltaSpecError, match=r"DS409.*linear needs sources of one rank, not 3, 1 \(b\)\n.*cat, or svd"):
        plan(Net(), data)


def test_budgets_of_sources_count_and_a_round_trip():
    data = spec("cat", source={"rank": {"budget": 60}})
    made = plan(Net(), data, example_inputs=X)
    assert [d.params.rank for d in made.deltas] == [2, 2, 4]
    loaded = deltaspec.load(data)
    assert deltaspec.load(loaded.to_data()) == loaded
    assert loaded.to_data()["deltas"][2] == {
        "name": "blend",
        "from": {"french": 0.7, "legal": -0.3},
        "combine": "cat",
        "attached": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[1].update(target="a"), r"french and legal have different sites; only french has \(b\)"),
        (lambda d: [e["params"].update(bias=True) for e in d[:2]], "a source changes the bias, too"),
        (lambda d: d[0]["params"].update(use_dora=True), "linear takes plain factors"),
        (lambda d: d[0]["params"].update(init="pissa"), "linear takes plain factors"),
        (lambda d: d[1]["params"].update(rank=2), "linear needs sources of one rank, not 3, 2"),
    ],
)
def test_what_the_plan_refuses(change, message):
    data = spec()
    for entry in data["deltas"][:2]:
        entry["params"] = dict(entry["params"])
    change(data["deltas"])
    with pytest.raises(DeltaSpecError, match=message) as caught:
        plan(Net(), data)
    assert {(f.code, f.where) for f in caught.value.diagnostics} == {("DS409", "deltas[2].from")}
    assert all(found.suggestion for found in caught.value.diagnostics)


def test_grouped_convolutions_and_norms_have_no_derived_form():
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(DeltaSpecError, match="DS409.*grouped convolution"):
        plan(grouped, spec(source={"rank": 2}), example_inputs=torch.zeros(1, 4, 3))
    with pytest.raises(DeltaSpecError, match="DS409.*low-rank update"):
        plan(nn.Sequential(nn.LayerNorm(4)), spec("svd", {"rank": 2}, method="ssf", source={}))


def test_tree_and_explain_show_it_where_its_sources_are():
    from deltaspec.backbone.observe import Observations
    from deltaspec.backbone.tabulate import tabulate
    from deltaspec.reports.tree import targets
    from deltaspec.reports.verdicts import find_row, verdicts

    model, loaded = Net(), deltaspec.load(spec(target="a"))
    table = tabulate(model)
    assert [match.row.fqn for match in targets(loaded, 2, table)[0]] == ["a"]
    for fqn in ("a", "b"):
        found = verdicts(loaded, table, Observations(model, X), find_row(table, fqn))
        assert [(v.delta, v.taken) for v in found] == [(n, fqn == "a") for n in ("french", "legal", "blend")]
        assert found[2].outcome.startswith("as its source french: ")


# The document


def finding(**blend):
    entries = spec()["deltas"]
    given = {key.rstrip("_"): value for key, value in blend.items()}
    entries[2] = {key: value for key, value in {**entries[2], **given}.items() if value is not ...}
    return deltaspec.validate({"deltaspec": 1, "deltas": entries})


@pytest.mark.parametrize(
    ("blend", "code", "where", "message", "hint"),
    [
        ({"from_": {"french": 1, "legel": 1}}, "DS223", "from.legel", 'no delta is named "legel"', 'mean "legal"'),
        ({"from_": {"blend": 1}}, "DS224", "from", "circular derivation: blend → blend", "break the circle"),
        ({"from_": {}}, "DS209", "from", "from is an empty mapping", "name the sources"),
        ({"from_": {"french": "1"}}, "DS203", "from.french", "french must be a number", "write 1"),
        ({"from_": ["french"]}, "DS203", "from", "from must be a mapping", None),
        ({"from_": {"french": 1e9}}, "DS204", "from.french", "french must be at most 1000000", None),
        ({"combine": ...}, "DS202", "", 'lacks the key "combine"', "combine: linear"),
        ({"combine": "line"}, "DS205", "combine", 'combine knows no value "line"', 'mean "linear"'),
        ({"method": "lora"}, "DS201", "method", '"method" has no place beside "from"', "delete one of the two"),
        ({"target": "a"}, "DS201", "target", '"target" has no place beside "from"', "its sources' sites"),
        ({"overrides": []}, "DS201", "overrides", '"overrides" has no place beside "from"', None),
        ({"weights": {}}, "DS201", "weights", 'unknown key "weights"', 'mean "from"'),
        ({"from_": ..., "method": "lora"}, "DS201", "combine", '"combine" has no place without "from"', "name the s"),
        ({"params": {"density": 0.5}}, "DS210", "params.density", "linear does not use it", "ties, dare_linear"),
        ({"combine": "ties"}, "DS210", "", "ties needs a density", "density: 0.5"),
        ({"combine": "ties", "params": {"density": 0}}, "DS204", "params.density", "greater than 0", None),
        ({"params": {"alpha": 3}}, "DS201", "params.alpha", 'unknown key "alpha"', None),
        ({"combine": "svd", "params": {"svd_rank": 3}}, "DS201", "params.svd_rank", "svd_rank", 'mean "rank"'),
    ],
)
def test_wrong_documents(blend, code, where, message, hint):
    [found] = finding(**blend)
    assert (found.code, found.where) == (code, f"deltas[2].{where}".rstrip("."))
    assert message in found.message
    assert hint is None or hint in found.suggestion


def test_circles_and_methods():
    entries = spec()["deltas"]
    entries += [{"name": name, "from": {other: 1}, "combine": "cat"} for name, other in (("x", "y"), ("y", "x"))]
    [found] = deltaspec.validate({"deltaspec": 1, "deltas": entries})
    assert found.message in ("circular derivation: x → y → x", "circular derivation: y → x → y")
    mixed = spec()
    mixed["deltas"][1]["method"] = "loha"
    [found] = deltaspec.validate(mixed)
    assert found.code == "DS225" and "french (lora), legal (loha)" in found.message
    for method, words in (("adapter", "adapter does not add to a weight"), ("full", "full does not add to a weight")):
        [found] = deltaspec.validate(spec("svd", {"rank": 2}, method=method, source={}))
        assert found.code == "DS225" and words in found.message
    [found] = deltaspec.validate(spec(method="vera"))
    assert (found.code, found.suggestion) == ("DS225", "use combine: svd")
    [found] = deltaspec.validate(spec("svd", method="c3a", source={"block_size": 2}))
    assert (found.code, found.suggestion) == ("DS210", "write params: {rank: 8}")


def test_the_published_schema_tells_derived_deltas_apart():
    from jsonschema import Draft7Validator, Draft202012Validator

    from deltaspec.language.schema.generate import schema

    for kind in (Draft7Validator, Draft202012Validator):
        validator = kind(schema(methods()))
        assert validator.is_valid(spec("ties", {"density": 0.5}))
        for wrong in (spec(method="lora", combine="sum"), spec(target_="x"), spec(params={"alpha": 1})):
            assert not validator.is_valid(wrong)
        both = spec()
        both["deltas"][2]["method"] = "lora"
        assert not validator.is_valid(both)


def test_weights_that_are_all_zero_are_refused() -> None:
    deltas = [{"name": "a", "method": "lora"}, {"name": "b", "method": "lora"}]
    for weights, found in (({"a": 0, "b": 0.0}, 1), ({"a": 0, "b": 0.5}, 0)):
        blend = {"name": "blend", "from": weights, "combine": "linear"}
        findings = deltaspec.validate({"deltaspec": 1, "deltas": [*deltas, blend]})
        assert [f.code for f in findings] == ["DS204"] * found
