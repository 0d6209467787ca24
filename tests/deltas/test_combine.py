"""The tensors of derived deltas: what they are, when they are computed, how they are saved and copied."""

import copy
import pickle

import pytest
import torch
from blends import Net, X, compiled_blend, equal, spec, tensors, train

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


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
    backbone = Net().eval()
    compiled = compiled_blend(backbone)
    train(compiled, "french")
    with pytest.raises(DeltaSpecError, match=r"DS528.*\n.*c.refresh\('blend'\)"):
        compiled.save(tmp_path)
    assert not list(tmp_path.iterdir())
    compiled.refresh("blend").save(tmp_path)
    compiled.detach()
    train(compiled, "legal")
    compiled.save(tmp_path)  # detached: computed on the way
    again = deltaspec.restore(backbone, tmp_path)
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
