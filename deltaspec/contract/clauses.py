"""The contract that every method keeps, clause by clause; `deltaspec.testing.check_method` checks it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.reserved import home
from deltaspec.compiler.compile import compile_plan
from deltaspec.compiler.restore import restore
from deltaspec.contract import sharing
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import Case, ContractError, Outputs, disturb, floats, require, same, seed, storages
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import methods


def _counts(case: Case) -> None:
    """Check that the plan counts and shapes exactly the tensors that compiling makes."""
    compiled = compile_plan(case.model, case.single, case.capture)
    made = dict(compiled.deltas["one"].tensors())
    declared = {storage_key(s.site.row.fqn, t): (t.shape, t.buffer) for s in case.single.sites for t in s.tensors}
    seen = {key: (tuple(tensor.shape), not isinstance(tensor, nn.Parameter)) for key, tensor in made.items()}
    require(seen == declared, f"tensors {seen} were made, and {declared} planned")
    real = sum(p.numel() for p in compiled.parameters() if p.requires_grad)
    planned = case.single.trainable
    require(real == planned > 0, f"{real} trainable values were made, and {planned} planned")


def _initial_values(case: Case) -> None:
    """Check that initial values follow from seed, delta, site and tensor alone, whatever torch's random state."""
    state = torch.random.get_rng_state()
    first = dict(compile_plan(case.model, case.single, case.capture).deltas["one"].tensors())
    require(torch.equal(state, torch.random.get_rng_state()), "compiling advanced torch's random state")
    with seed(99):
        again = dict(case.compile(trained=False).deltas["one"].tensors())
    other = [key for key in first if not torch.equal(first[key], again[key])]
    require(not other, f"with another delta before it, and another random state, {other} start otherwise")


def _identity_at_start(case: Case) -> None:
    """Check that, where promised, a fresh delta leaves the output of the frozen model as it is, to the bit."""
    compiled = compile_plan(case.model, case.single, case.capture)
    # torch picks kernels by requires_grad (a GRU's, some attention's), so the measure is the model out of training.
    frozen = clone(case.model).requires_grad_(False)
    if methods()[case.method].is_identity_at_start(case.single.deltas[0].params):
        require(same(case.run(compiled), case.run(frozen)), "the output differs before any training")
    compiled.detach()
    require(same(case.run(compiled), case.reference), "the output differs with nothing attached")


def _gradients(case: Case) -> None:
    """Check that attached deltas alone get gradients, each parameter one, and no kind of tensor only zeros."""
    compiled = case.compile().train()
    compiled.only("one")
    with seed(3):
        try:
            reached = (loss := case.loss(compiled)).requires_grad
        except DeltaSpecError as error:
            if {finding.code for finding in error.diagnostics} != {"DS468"}:
                raise
            reached = False  # the forward itself said so
        require(reached, "no trainable value reaches the output")
        torch.autograd.backward(loss)
    mine = {id(p) for p in compiled.deltas["one"].parameters()}
    stray = [name for name, p in compiled.named_parameters() if id(p) not in mine and p.grad is not None]
    require(not stray, f"{stray[:5]} got gradients, and belong to no attached delta")
    kinds: dict[str, bool] = {}
    for planned in case.single.sites:
        for spec in planned.tensors:
            tensor = compiled.deltas["one"].tensor(storage_key(planned.site.row.fqn, spec))
            if spec.buffer:
                continue
            if tensor.grad is None:
                raise ContractError(f"{planned.fqn}: {spec.name} got no gradient")
            finite = bool(torch.isfinite(tensor.grad).all())
            require(finite, f"{planned.fqn}: the gradient of {spec.name} is not finite")
            kinds[spec.name] = kinds.get(spec.name, False) or bool(tensor.grad.count_nonzero())
    dead = [name for name, alive in kinds.items() if not alive]
    require(not dead, f"the gradients of {dead} are zero at every site")


def _reversibility(case: Case) -> None:
    """Check that outputs depend on the active set alone, and that detaching leaves nothing of a delta behind."""
    compiled = case.compile()
    expected: dict[frozenset[str], Outputs] = {}
    for names in case.active_sets(compiled):
        compiled.only(*names)
        expected[frozenset(names)] = case.run(compiled)
    require(same(expected[frozenset()], case.reference), "detached, the output is not the original's")
    for name in ("one", "two"):
        require(not same(expected[frozenset({name})], case.reference), f"delta {name!r} changes nothing")
    fresh = snapshot(clone(case.model))
    together = frozenset({"one", "two"}) in expected
    walk = "+one +two -one +one -two -one +two +one -one -two" if together else "+one -one +two -two +two =one -one"
    compiled.detach()
    for step in walk.split():
        {"+": compiled.attach, "-": compiled.detach, "=": compiled.only}[step[0]](step[1:])
        active = frozenset(compiled.attached)
        require(
            same(case.run(compiled), expected[active]),
            f"at {step} in {walk!r}, {set(active) or 'nothing'} gives other bits",
        )
        if not active and (left := differences(fresh, snapshot(compiled.backbone, skip=home(compiled.backbone)))):
            raise ContractError(f"at {step} in {walk!r}, something is left: " + "; ".join(left[:5]))
    compiled.only("one")
    require(same(case.run(compiled.backbone), expected[frozenset({"one"})]), "the backbone alone gives other bits")
    with seed(3):
        torch.autograd.backward(case.loss(compiled.train()))
    compiled.eval()
    compiled.detach()
    left = differences(fresh, snapshot(compiled.backbone, skip=home(compiled.backbone)))
    require(not left, "after a training step, something is left: " + "; ".join(left[:5]))
    detached = case.run(compiled)
    require(same(detached, case.reference), "after a training step, the detached output is not the original's")


def _files(case: Case) -> None:
    """Check that what is saved comes back to the bit: tensors, outputs and the active set."""
    compiled = case.compile()
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(folder)
        back = restore(case.model, folder, capture=case.capture, example_inputs=case.inputs)
        loaded = case.compile(trained=False).load(folder)
    require(back.attached == compiled.attached, f"{back.attached} are attached, and {compiled.attached} were")
    for names in case.active_sets(compiled):
        outputs = []
        for each in (compiled, back, loaded):
            each.only(*names)
            outputs.append(case.run(each))
        require(same(outputs[0], outputs[1]), f"restored, {names} give other bits")
        require(same(outputs[0], outputs[2]), f"loaded, {names} give other bits")


def _merging(case: Case) -> None:
    """Check that merging gives a plain model that computes the same, or that it is refused (DS435) by promise."""
    compiled = case.compile()
    weight = methods()[case.method].promises.weight
    for names in filter(None, case.active_sets(compiled)):
        compiled.only(*names)
        try:
            merged = compiled.merge()
        except DeltaSpecError as error:
            codes = {finding.code for finding in error.diagnostics}
            require(codes == {"DS435"}, f"merging is refused: {error}")
            homeless = weight is not None and all("no place" in finding.message for finding in error.diagnostics)
            require(weight is None or homeless, f"the method promises weights, yet: {error}")
            continue
        require(weight is not None, f"merging {names} was not refused, though promises.weight is None")
        for attached, plain in zip(floats(case.run(compiled)), floats(case.run(merged)), strict=True):
            off = (attached.float() - plain.float()).abs().max().item()
            require(
                torch.allclose(attached.float(), plain.float(), rtol=case.tolerance, atol=case.tolerance),
                f"merged {names} differ from attached by up to {off:.2g}",
            )
        _require_plain(case.model, merged)


def _require_plain(model: nn.Module, merged: nn.Module) -> None:
    require(type(merged) is type(model), f"the merged model is a {type(merged).__name__}")
    before, after = dict(model.named_modules()), dict(merged.named_modules())
    require(list(before) == list(after), f"the merged model has other modules: {sorted(before.keys() ^ after.keys())}")
    for fqn, module in after.items():
        new = module.__dict__.keys() - before[fqn].__dict__.keys()
        require(not new and type(module) is type(before[fqn]), f"new in the merged {fqn or 'model'}: {sorted(new)}")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    changed = [name for name, p in merged.named_parameters() if flags.get(name, p.requires_grad) is not p.requires_grad]
    require(not changed, f"requires_grad of {changed[:5]} differs in the merged model")
    require(not storages(model) & storages(merged), "the merged model shares storage with the original")


def _copies(case: Case) -> None:
    """Check that a deep copy computes the same and shares nothing with what it was copied from."""
    compiled = case.compile()
    compiled.only("one")
    before = case.run(compiled)
    twin = copy.deepcopy(compiled)
    require(same(case.run(twin), before), "the copy gives other bits")
    require(twin.attached == ("one",), f"the copy has {twin.attached} attached")
    require(not storages(twin) & storages(compiled), "the copy shares storage with what it was copied from")
    disturb(twin)
    require(not same(case.run(twin), before), "the copy does not follow its own tensors")
    require(same(case.run(compiled), before), "training the copy changes what it was copied from")
    twin.detach()
    require(same(case.run(twin), case.reference), "the detached copy is not the original")
    require(compiled.attached == ("one",), "detaching the copy detaches what it was copied from")


def _learning(case: Case) -> None:
    """Check that a few steps of SGD, and of Adam, lower a loss, with one of three step lengths."""
    optimizers = (("SGD", torch.optim.SGD, 0.02), ("Adam", torch.optim.Adam, 0.002))
    for name, make, longest in optimizers:
        losses = []
        for factor in (1.0, 0.1, 0.01):
            start, end = _losses(case, make, longest * factor)
            losses.append(f"{start:.6g} to {end:.6g}")
            if end < start:
                break
        else:
            raise ContractError(f"six steps of {name} took the loss from {', '.join(losses)}")


def _losses(case: Case, make: Callable[..., torch.optim.Optimizer], rate: float) -> tuple[float, float]:
    """Return the loss before and after six steps."""
    compiled = compile_plan(case.model, case.single, case.capture)
    parameters = list(compiled.trainable_parameters())
    optimizer = make(parameters, lr=rate)
    start = case.loss(compiled).item()
    for step in range(6):
        optimizer.zero_grad()
        torch.autograd.backward(case.loss(compiled))
        # Steps of one length, whatever the scale of the method's gradients: else some would round to nothing.
        given = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(given)
        if not norm:
            require(step > 0, "all gradients of a fresh delta are zero, so it cannot learn")
            break
        for gradient in given:
            gradient.div_(norm)
        optimizer.step()
    return start, case.loss(compiled).item()


CLAUSES: dict[str, Callable[[Case], None]] = {
    "counts": _counts,
    "initial values": _initial_values,
    "identity at start": _identity_at_start,
    "gradients": _gradients,
    "reversibility": _reversibility,
    "files": _files,
    "merging": _merging,
    "copies": _copies,
    "learning": _learning,
    "strength": sharing.strength,
    "rows": sharing.rows,
}
"""In the order in which they are checked."""
