"""What the plan says of methods on weights that are kept as codes, or computed."""

import pytest
import torch
from packed_bases import UNREADABLE, Offered, inputs, net
from torch.nn.utils import parametrizations

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods

READERS = {
    "dora": {"method": "lora", "params": {"rank": 2, "use_dora": True}},
    "pissa": {"method": "lora", "params": {"rank": 2, "init": "pissa"}},
    "hira": {"method": "hira", "params": dict(methods()["hira"].small)},
    "full": {"method": "full"},
}
OTHERS = {name: {"method": name, "params": dict(methods()[name].small)} for name in ("lora", "oft", "ia3", "bitfit")}


def spec(delta, **more):
    return {"deltaspec": 1, "deltas": [{"name": "d", **delta, "target": {"path": ["a", "b"]}}], **more}


@pytest.mark.parametrize("form", UNREADABLE)
@pytest.mark.parametrize("reader", READERS)
def test_what_reads_codes_that_nobody_else_can_read_is_refused_by_name(form, reader):
    with pytest.raises(DeltaSpecError) as error:
        deltaspec.plan(net(UNREADABLE[form]), spec(READERS[reader]), example_inputs=inputs())
    [finding] = error.value.diagnostics
    assert finding.code == "DS402" and finding.suggestion
    assert ("float8_e4m3fn" if form == "float8" else "packed uint8") in finding.message


@pytest.mark.parametrize("form", [*UNREADABLE.values(), Offered])
@pytest.mark.parametrize("method", OTHERS)
def test_the_plan_of_a_packed_model_is_that_of_the_plain_one(form, method):
    plain = deltaspec.plan(net(), spec(OTHERS[method]), example_inputs=inputs())
    packed = deltaspec.plan(net(form), spec(OTHERS[method]), example_inputs=inputs())
    assert packed == plain and packed.structure == plain.structure
    assert (packed.base_parameters, packed.fraction) == (plain.base_parameters, plain.fraction)


def test_budgets_are_of_the_values_that_codes_stand_for():
    low = {"method": "lora", "params": {"rank": {"budget": "20%"}}}
    plain, packed = (deltaspec.plan(net(f), spec(low), example_inputs=inputs()) for f in (None, UNREADABLE["buffer"]))
    assert packed.deltas[0].params == plain.deltas[0].params and packed == plain


def test_a_change_of_a_parametrised_weight_is_refused_and_its_start_is_read():
    model = net()
    parametrizations.weight_norm(model.a)
    parametrizations.weight_norm(model.b)
    with pytest.raises(DeltaSpecError, match="a parametrisation computes the weight"):
        deltaspec.plan(model, spec(READERS["hira"]), example_inputs=inputs())
    for name in ("dora", "pissa"):
        compiled = deltaspec.compile(model, spec(READERS[name]), example_inputs=inputs())
        assert torch.allclose(compiled(inputs()), model(inputs()), atol=1e-6)
