"""Matrices: names, order, what is refused and where, and that a spec written out by hand is the same one."""

import json
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from blends import Net
from repository import ROOT

import deltaspec
from deltaspec.documents.document import from_data
from deltaspec.language.derivation import DerivedParams
from deltaspec.language.matrix import MOST, label, written_out
from deltaspec.planning.lock import check_lock, lock, write_lock

AXES = {"rank": [4, 2], "train.lr": [1e-3, 3e-4]}


def entry(matrix, **more):
    return {"name": "french", "method": "lora", "target": "*", "matrix": matrix, **more}


def spec(matrix, *others, **more):
    return {"deltaspec": 1, "deltas": [entry(matrix, **more), *others]}


def names(*deltas):
    return [delta.name for delta in deltaspec.load({"deltaspec": 1, "deltas": [*deltas]}).deltas]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4, "4"), (1e-3, "1e-3"), (3e-4, "3e-4"), (2.5e-4, "2.5e-4"), (0.05, "0.05"), (0.1, "0.1"), (16.0, "16"),
     (1e6, "1e6"), (0.0, "0"), (1e-12, "1e-12"), (1.25, "1.25"), (True, "true"), ("pissa", "pissa"),
     (["q", "v"], "q+v"), ({"budget": "0.5%"}, "budget:0.5%"), ("a b, [c]", "a-b-c-"), (-2, "-2")],
)  # fmt: skip
def test_labels(value, text):
    assert label(value) == text


def test_names_are_those_of_all_combinations_the_last_axis_first():
    assert names(entry(AXES)) == [
        "french[rank=4,lr=1e-3]", "french[rank=4,lr=3e-4]", "french[rank=2,lr=1e-3]", "french[rank=2,lr=3e-4]",
    ]  # fmt: skip
    # Two axes of one short name are told apart; a method of a plug-in may have a parameter that is called as a hint.
    given = from_data(spec({"seed": [1], "train.seed": [2]}))
    made, findings = written_out(given, {"lora": SimpleNamespace(Params=DerivedParams)})
    assert made.data["deltas"][0]["name"] == "french[seed=1,train.seed=2]" and findings == []


def test_what_a_matrix_means_is_what_one_would_write_by_hand(tmp_path):
    points = [(rank, lr, text) for rank in (4, 2) for lr, text in ((1e-3, "1e-3"), (3e-4, "3e-4"))]
    train = {"schedule": "cosine", "warmup": 10}
    by_hand = [
        {**entry({}), "name": f"french[rank={rank},lr={text}]", "params": {"alpha": 3, "rank": rank},
         "train": {**train, "lr": lr}, "attached": False}
        for rank, lr, text in points
    ]  # fmt: skip
    for delta in by_hand:
        del delta["matrix"]
    made = deltaspec.plan(Net(), spec(AXES, params={"alpha": 3}, train=train))
    written = deltaspec.plan(Net(), {"deltaspec": 1, "deltas": by_hand})
    assert made.fingerprint == written.fingerprint and made.specs[0] == written.specs[0]
    assert lock(made) == lock(written)
    assert [dict(delta.matrix) for delta in made.deltas] == [{"rank": r, "train.lr": lr} for r, lr, _ in points]
    assert "french: a matrix of 4 deltas, rank 4, 2 × train.lr 1e-3, 3e-4" in str(made)
    assert "Total: 4 deltas, 8 sites" in str(made) and "train: lr=0.0003 warmup=10 schedule=cosine" in str(made)
    assert [delta.attached for delta in made.deltas] == [False] * 4
    assert deltaspec.compile(Net(), spec({"rank": [2]}, attached=True)).attached == ("french[rank=2]",)
    # A changed hint is a change of the lock, and of nothing that is compiled.
    write_lock(made, tmp_path / "lock.json")
    other = deltaspec.plan(Net(), spec(AXES, params={"alpha": 3}, train={**train, "warmup": 20}))
    assert other.fingerprint == made.fingerprint
    assert {d.code for d in check_lock(other, tmp_path / "lock.json")} == {"DS514"}
    assert "train is lr 0.001, warmup 20" in check_lock(other, tmp_path / "lock.json")[0].message


def test_locks_of_specs_without_a_matrix_say_nothing_of_it():
    text = lock(deltaspec.plan(Net(), {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "*"}]}))
    assert "train\"" not in text and "matrix" not in text  # fmt: skip


@pytest.mark.parametrize(
    ("delta", "code", "where", "message", "hint"),
    [
        ({"matrix": {}}, "DS209", "matrix", "matrix is an empty mapping", None),
        ({"matrix": {"rank": []}}, "DS209", "matrix.rank", "rank is an empty list", None),
        ({"matrix": {"rank": 4}}, "DS203", "matrix.rank", "rank must be a list", "write a list: [4]"),
        ({"matrix": [4]}, "DS203", "matrix", "matrix must be a mapping or text", None),
        ({"matrix": {"rnak": [4]}}, "DS201", "matrix.rnak", 'unknown key "rnak"', 'did you mean "rank"?'),
        ({"matrix": {"r": [4]}}, "DS201", "matrix.r", 'unknown key "r"', 'did you mean "rank"?'),
        ({"matrix": {"lr": [4]}}, "DS201", "matrix.lr", 'unknown key "lr"', "train.lr"),
        ({"matrix": {"params.rank": [4]}}, "DS201", "matrix.params.rank", "unknown key", "write rank"),
        ({"matrix": {"train.lrr": [4]}}, "DS201", "matrix.train.lrr", "unknown key", 'did you mean "train.lr"?'),
        ({"matrix": {"dtype": ["float32"]}}, "DS201", "matrix.dtype", "unknown key", "a matrix lists parameters"),
        ({"matrix": {"rank": [4, 8, 4]}}, "DS228", "matrix.rank[2]", "4 is listed twice", "delete one"),
        ({"matrix": {"alpha": [4, 4.0]}}, "DS228", "matrix.alpha[1]", "4.0 is listed twice", None),
        ({"matrix": {"rank": [4]}, "params": {"rank": 2}}, "DS228", "matrix.rank", "and in params, too", "delete one"),
        ({"matrix": {"train.lr": [1]}, "train": {"lr": 2}}, "DS228", "matrix.train.lr", "and in train, too", None),
        ({"matrix": {"rank": [4, 0]}}, "DS204", "matrix.rank[1]", "rank must be at least 1, not 0", None),
        ({"matrix": {"rank": [4, None]}}, "DS203", "matrix.rank[1]", "has no value", None),
        ({"matrix": {"train.warmup": [10, -1]}}, "DS204", "matrix.train.warmup[1]", "at least 0, not -1", None),
        ({"matrix": {"train.warmup": [-0.5]}}, "DS204", "matrix.train.warmup[0]", "greater than 0, not -0.5", None),
        ({"matrix": {"train.warmup": [10, "0.1"]}}, "DS203", "matrix.train.warmup[1]", 'not "0.1"', "without quotes"),
        ({"matrix": {"train.schedule": ["cosine", "cosin"]}}, "DS205", "matrix.train.schedule[1]", "cosin", "cosine"),
        ({"matrix": {"use_dora": [False, True]}, "params": {"parts": ["q"]}}, "DS210", "params", "parts", None),
        ({"matrix": {"rank": [*range(1, 20)], "alpha": [*range(1, 20)]}}, "DS228", "matrix", "361 deltas", "fewer"),
        ({"matrix": {"rank": [2]}, "target": "**.["}, "DS216", "target", "", None),
        ({"matrix": {"rank": [2, 4]}, "name": "a b"}, "DS208", "name", "is not a name", None),
        ({"matrix": {"train.lr_ratio": [2, 4]}, "train": {"lr": 1}, "method": "ia3"}, "DS229",
         "matrix.train.lr_ratio[0]", "ia3 has no second factor", "it is for adalora"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_where_it_is_listed(delta, code, where, message, hint):
    found = deltaspec.validate({"deltaspec": 1, "deltas": [{**entry({}), **delta}]})
    assert found[0].code == code and found[0].where == f"deltas[0].{where}", found
    assert message in found[0].message and (hint is None or hint in found[0].suggestion)
    assert len(found) == (2 if code == "DS229" else 1), found


def test_all_findings_at_once_each_at_its_line(tmp_path):
    path = tmp_path / "sweep.deltaspec.yaml"
    path.write_text(
        "deltaspec: 1\ndeltas:\n  - {name: plain, method: lora, target: '*'}\n  - name: french\n    method: lora\n"
        "    target: '**.a'\n    matrix:\n      rank: [4, 0,\n             8.5]\n      rnak: [1]\n      train.lr: [x]\n"
        "  - {name: 'french[rank=4,lr=1]', method: lora, target: '*', lr: 3}\n"
    )
    found = [(d.code, d.line, d.column) for d in deltaspec.validate(path)]
    assert found == [("DS204", 8, 17), ("DS203", 9, 14), ("DS201", 10, 7), ("DS203", 11, 18), ("DS201", 12, 62)]


def test_entries_behind_a_matrix_are_counted_as_they_are_written():
    found = deltaspec.validate(spec({"rank": [4, 8, 16]}, {"name": "e", "target": "*"}))
    assert [(d.where, d.message) for d in found] == [("deltas[1]", 'deltas[1] lacks the key "method"')]


def test_an_entry_that_follows_the_matrix_of_another_one():
    head = {"name": "head", "method": "full", "target": "b", "matrix": "french"}
    body = entry({"rank": [4, 2], "train.lr": [1e-3], "train.lr_ratio": [2]}, target="a")
    made = deltaspec.load({"deltaspec": 1, "deltas": [body, head]})
    assert [d.name for d in made.deltas[2:]] == ["head[rank=4,lr=1e-3,lr_ratio=2]", "head[rank=2,lr=1e-3,lr_ratio=2]"]
    assert [d.train.to_data() for d in made.deltas[2:]] == [{"lr": 1e-3}] * 2 and not made.deltas[2].attached
    made = deltaspec.load({"deltaspec": 1, "deltas": [body, {**head, "train": {"lr": 0.5}}]})
    assert made.deltas[2].train.lr == 0.5
    assert deltaspec.plan(Net(), made)["head[rank=2,lr=1e-3,lr_ratio=2]"].trainable == 56
    for matrix, message, hint in (
        ("frensh", "is no delta of this spec", 'did you mean "french"?'),
        ("head", "has no matrix of its own", "name an entry with a matrix"),
    ):
        [found] = deltaspec.validate({"deltaspec": 1, "deltas": [body, {**head, "matrix": matrix}]})
        assert (found.code, found.where) == ("DS228", "deltas[1].matrix")
        assert message in found.message and hint in found.suggestion
    [found] = deltaspec.validate({"deltaspec": 1, "deltas": [head, body]})
    assert (found.code, found.message) == ("DS228", '"french" comes after it')


def test_names_that_clash():
    twice = {"name": "french[rank=4]", "method": "lora", "target": "*"}
    [found] = deltaspec.validate(spec({"rank": [4, 8]}, twice))
    assert found.code == "DS211" and found.where == "deltas[1].name" and "deltas[0]" in found.message
    both = deltaspec.validate(spec({"rank": [4, 8]}, entry({"rank": [8, 16]})))
    assert [(d.code, d.where) for d in both] == [("DS211", "deltas[1].name")]


def test_the_limit_is_that_of_all_matrices_together():
    many = [{**entry({"rank": [*range(1, 129)]}), "name": f"d{i}"} for i in range(3)]
    [found] = deltaspec.validate({"deltaspec": 1, "deltas": many})
    assert found.where == "deltas[2].matrix" and f"384 deltas; at most {MOST}" in found.message
    assert len(names(*many[:2])) == MOST
    regex = {**many[0], "target": {"regex": ".*"}}  # one expression, not 128 of the 200 that there may be
    assert deltaspec.validate({"deltaspec": 1, "deltas": [regex, {**regex, "name": "e"}]}) == []


def test_findings_about_the_model_are_told_once():
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.plan(Net(), spec({"rank": [4, 8, 2]}, target="**.nope"))
    [found] = caught.value.diagnostics
    assert (found.code, found.where) == ("DS302", "deltas[0].target.path")
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.plan(Net(), spec({"rank": [2, 3]}, expect={"trainable": 28 * 2}))
    [found] = caught.value.diagnostics
    assert found.where == "deltas[0].expect.trainable" and "'french[rank=3]'" in found.message


def test_derived_deltas_budgets_and_overrides_with_a_matrix():
    blend = {"name": "blend", "from": {"french[rank=4]": 1, "french[rank=2]": 0.5}, "combine": "svd"}
    made = deltaspec.load(spec({"rank": [4, 2]}, {**blend, "matrix": {"rank": [1, 2]}}))
    assert [delta.name for delta in made.deltas][2:] == ["blend[rank=1]", "blend[rank=2]"]
    assert deltaspec.plan(Net(), made)["blend[rank=2]"].derived.params.rank == 2
    [found] = deltaspec.validate(spec({"rank": [4, 2]}, {**blend, "from": {"french": 1}}))
    assert found.code == "DS223" and found.suggestion == 'did you mean "french[rank=4]"?'
    [found] = deltaspec.validate(spec({"rank": [4, 2]}, {**blend, "matrix": {"train.lr": [1e-3]}}))
    assert found.code == "DS228" and "not trained" in found.message
    [found] = deltaspec.validate(spec({"rank": [4, 2]}, {**blend, "train": {"lr": 1e-3}}))
    assert found.code == "DS201" and found.suggestion == "a derived delta is not trained: delete it"
    plan = deltaspec.plan(Net(), spec({"rank": [{"budget": 28}, {"budget": "60%"}, 1]}))
    assert [(d.name, d.params.rank) for d in plan.deltas] == [
        ("french[rank=budget:28]", 1), ("french[rank=budget:60%]", 2), ("french[rank=1]", 1),
    ]  # fmt: skip
    overrides = [{"match": "a", "params": {"rank": 3}}]
    plan = deltaspec.plan(Net(), spec({"rank": [2, 4]}, overrides=overrides))
    assert [[site.params.rank for site in delta.sites] for delta in plan.deltas] == [[3, 2], [3, 4]]


def test_names_on_disk_in_states_and_libraries(tmp_path):
    model = Net()
    c = deltaspec.compile(model, spec(AXES))
    with torch.no_grad():
        for number, delta in enumerate(c.deltas.values()):
            for parameter in delta.parameters():
                parameter.fill_(0.1 * (number + 1))
    name = "french[rank=2,lr=1e-3]"
    c.save(tmp_path / "all")
    again = deltaspec.restore(model, tmp_path / "all", name)
    assert [*again.deltas] == [name] and again.plan[name].train.lr == 1e-3
    x = torch.ones(2, 8)
    expected = c.only(name) and c(x)
    again.attach()
    assert torch.equal(again(x), expected)
    bare = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "*"}]})
    bare.library(tmp_path / "all")
    bare.only(name)
    assert torch.equal(bare(x), expected)
    twin = deltaspec.compile(model, spec(AXES))
    twin.load_state_dict(c.state_dict())
    assert torch.equal(twin(x, deltas=[name, None]), c(x, deltas=[name, None]))
    # The hints of the model and those of the files may differ.
    deltaspec.compile(model, spec({**AXES}, train={"warmup": 5})).load(tmp_path / "all")
    with pytest.raises(deltaspec.DeltaSpecError, match=r"did you mean 'french\[rank=4,lr=1e-3\]'"):
        c.only("french")


def test_the_published_schema_takes_a_matrix():
    published = json.loads((ROOT / "schemas/deltaspec-v1.schema.json").read_text(encoding="utf-8"))
    checker = jsonschema.Draft7Validator(published)
    assert checker.is_valid(spec(AXES)) and not checker.is_valid(spec({"rank": 4}))
    assert not checker.is_valid(spec(AXES, train={"lrr": 1}))
