"""The backbone's weights are the user's own: a backward that reaches them is refused, at that moment.

By a hook on each parameter of the copy, which costs nothing until such a backward comes. Flags cannot do it: while
nothing is attached they are what they were, since the attention kernel that torch picks, and so the bits, depend on
them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.names.paths import below


@unserializable_hook
class _Refusal:
    """The hook of one parameter."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, gradient: Tensor) -> None:
        message = (
            f"a backward pass reaches {self._name} of the backbone, which nothing trains: "
            "it is your own model's memory, and training would change your model"
        )
        hint = (
            "attach a delta before the forward; to train the backbone, train your own model, or compile with "
            "train_backbone=True; for gradients of inputs alone, c.backbone.requires_grad_(False)"
        )
        raise DeltaSpecError([Diagnostic("DS416", message, file="<model>", suggestion=hint)])


class Untrained:
    """The parameters of one backbone that must get no gradient, by their modules' FQN and own name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._places = [(fqn, name) for fqn, module in modules.items() for name in module._parameters]
        self.follow(modules)

    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse what stands in these places now: parameters may have been moved, cast, loaded or copied."""
        for fqn, name in self._places:
            module = modules.get(fqn)  # a copy that is being made may have no parameters yet
            parameter = None if module is None else module.__dict__.get("_parameters", {}).get(name)
            if parameter is not None:
                _refuse(parameter, below(fqn, name))

    def leave(self, modules: Mapping[str, nn.Module], before: Mapping[str, nn.Module]) -> None:
        """Leave out modules that took the place of others: those are not the backbone's, and may be trained."""
        self._places = [(fqn, name) for fqn, name in self._places if modules.get(fqn) is before[fqn]]


def _refuse(parameter: nn.Parameter, name: str) -> None:
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return  # no gradient ever
    hooks: Mapping[int, object] = getattr(parameter, "_backward_hooks", None) or {}
    if any(isinstance(hook, _Refusal) for hook in hooks.values()):
        return
    trained = parameter.requires_grad
    parameter.requires_grad = True  # a hook can be put on nothing else; it stays when the flag goes
    parameter.register_hook(_Refusal(name))  # type: ignore[no-untyped-call]
    parameter.requires_grad = trained
