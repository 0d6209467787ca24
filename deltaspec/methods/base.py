"""What a delta-tuning method is: its parameters, its tensors as data, and its formula.

Nothing here imports torch at run time: the validator reads every method's parameters in CI,
where torch need not be installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deltaspec.backbone.table import Row
from deltaspec.methods.declarations import Form, MethodParams, Promises, Refusal, Site, TensorSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor


Weights = Mapping[str, "Tensor"]
"""A host's own parameters, by own name."""
Tensors = dict[str, "Tensor"]
"""Tensors by own name: new parameters of a host, or values of a delta."""


class Method(ABC):
    """A delta-tuning method. One file, one subclass, found by itself."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for the docs table and the schema's hover text."""
    paper: ClassVar[str]
    """`Title (arXiv:id)`."""
    Params: ClassVar[type[MethodParams]]
    promises: ClassVar[Promises]
    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters of an example, as in a spec; needed where some have no default."""
    small: ClassVar[Mapping[str, Any]] = {}
    """Parameters, as in a spec, that fit a model of width 8 to 32; needed where the defaults do not."""
    foreign: ClassVar[Mapping[str, str | Mapping[Any, str] | None]] = {}
    """What to write here for the parameters of other libraries' configurations of this method, by their names.

    The name of a parameter here; or what to write for each value there, which may be a regular expression
    (`{True: "scaling: rslora", r"pissa_niter_(\\d+)": r"{init: pissa, svd_iterations: \\1}"}`); or, with a space in it,
    the suggestion itself (`delete it: …`). Names that mean the same in other methods need to be declared by one."""
    start: ClassVar[frozenset[str]] = frozenset({"init"})
    """Names of params on which nothing but the initial values depends."""
    training: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """Names of params that act while the model trains, and then alone."""
    default_roles: ClassVar[tuple[str, ...]]
    """Roles that `target` stands for when a delta leaves it out; empty: `target` is required."""
    role_choice: ClassVar[str | None] = None
    """Name of the parameter by which a spec chooses between default roles; a delta that sets it names no `target`."""
    descends: ClassVar[bool] = False
    """A selected module stands for every module at and below it that owns parameters (see `descends_to`)."""
    matrices: ClassVar[bool] = False
    """Takes single parameters (`parameter:` atoms) that are a matrix or a stack of them, as in a mixture of experts.

    Such a site looks like a Linear (or Conv1D, where the matrices are stored as `[in, out]`) without a bias, whose
    `weight` is the parameter, or one matrix of the stack; it works by `fold` alone. All formulas are written for one
    matrix: tensors, initial values and `fold` are stacked outside."""
    strength: ClassVar[Literal["output", "weight", "attention"] | None] = "output"
    """What a strength scales: the way from what is without the delta (0, to the bit) to what is with it (1).

    `output`: the site's output, and what enters it where the formula changes that; where the site works by `fold`,
    its weight. `weight`: the weight at every site. `attention`: the attention's output. None: the method acts wholly or
    not at all."""
    faster: ClassVar[tuple[str, ...]] = ()
    """How the names of the tensors begin that LoRA+ (arXiv:2402.12354) trains faster: what comes last in the formula.

    `train: {lr_ratio: …}` multiplies their learning rate. Empty: the method has no such second factor."""
    attends: ClassVar[bool] = False
    """Works by `attend`, inside the attention function of its sites, instead of by `apply`."""

    @property
    def passing(self) -> frozenset[str]:
        """Names of params on which nothing depends that a trained delta computes: of its start, and of training."""
        return self.start | self.training

    def descends_to(self, row: Row) -> bool:
        """Return whether a module at or below a selected one is a site, where the method descends."""
        return bool(row.parameters)

    def is_identity_at_start(self, params: Any) -> bool:
        """Return whether `promises.identity_at_start` holds under these params; some starts give it up on request."""
        return self.promises.identity_at_start

    def roles(self, params: Any) -> tuple[str, ...]:
        """Return the default roles under these params."""
        return self.default_roles

    def dropout(self, params: Any) -> float:
        """Return the probability that `t.dropout` drops by: the parameter `dropout`, if the method has one."""
        return float(getattr(params, "dropout", 0.0))

    def rank(self, params: Any) -> int:
        """Return the rank that a delta derived from this one has by default: the parameter `rank`, else 1."""
        return int(getattr(params, "rank", 1))

    def is_default(self, row: Row, params: Any) -> bool:
        """Return whether a module is one of those that a left-out `target` stands for."""
        return not set(self.roles(params)).isdisjoint(row.roles)

    def settle(self, params: Any) -> Any:
        """Put into a delta's params what the plan has to look up outside the spec; or say, as a Refusal, why it cannot.

        The plan and all that is made from it, files included, have the result.
        """
        return params

    def remark(self, site: Site, params: Any) -> str | None:
        """Say in the plan what works at this site, but is hardly meant; None where there is nothing to say."""
        return None

    def refuse(self, site: Site, params: Any) -> Refusal | None:
        """Return why this site cannot be taken with these params; None where it can."""
        return None

    @abstractmethod
    def tensors(self, site: Site, params: Any) -> tuple[TensorSpec, ...]:
        """Declare the delta's tensors at a site. Called only where `refuse` gave None."""

    def initialise(
        self, site: Site, params: Any, weights: Mapping[str, Tensor], generator: Generator
    ) -> Mapping[str, Tensor]:
        """Return initial values that depend on the host's own parameters, by tensor name; the others start as declared.

        `weights` are the host's own parameters by own name, on the CPU, in float32 (float64 where they are that);
        `generator` is seeded for this site alone.
        """
        return {}

    def apply(self, form: Form, params: Any, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute the site's new hidden state; runs once under tracing, so it is plain torch code on proxies.

        `t.<name>` are the delta's tensors, `t.dropout(v)` is dropout by `self.dropout(params)`, `x` is the hidden
        state that enters the site. `base(x)` gives what leaves without this delta; call it once.
        `t.argument(name)` is what the host is called with by that name, None where it is not given (declare the names
        in `arguments`). `t.stream` is the hidden state that entered the module that `stream` names; where that runs
        inside the host, ask for it after `base`.
        `t.call(function, *args)` calls a Python function on the values themselves, once a forward.
        `base(x, weight=w, bias=None)` runs the host's own forward with these parameters in place of its own, and
        `base(x, weight_factor=f, bias=None)` with its own weight times f.
        Dtypes are settled outside: `x` comes in the delta's dtype, the result leaves in the host's.
        """
        raise AssertionError(f"{self.name} has no formula around a module's call")

    def attend(self, form: Form, params: Any, t: Any, q: Any, k: Any, v: Any, base: Callable[..., Any]) -> Any:
        """Compute the attention of a site: (output, weights or None). Runs in every forward; only where `attends`.

        `q`, `k`, `v` are `[batch, heads, positions, width]`. `base(q, k, v)` gives what is attended to without this
        delta; keys and values put in front of the given ones are seen by every query. Dtypes are not settled. Where
        rows have their own tensors, `t` gives them with the rows first, and of the `simpler` method, if there is one.
        """
        raise AssertionError(f"{self.name} has no formula inside attention")

    def virtual_tokens(self, params: Any) -> int:
        """Return the number of tokens that a delta of this method puts in front of the model's input.

        They arrive at the embedding that is the delta's site as ids -1, -2, … of the outermost delta, and further down
        those of the next: `apply` gives its own ones their rows.
        """
        return 0

    def leads(self, params: Any) -> bool:
        """Return whether the virtual tokens stand in front of padding on the left, and all are numbered by columns.

        Where several prompts are attached, one of them has all do so.
        """
        return False

    def stays(self, params: Any) -> bool:
        """Return whether the virtual tokens stay in what the model gives; one prompt has those of all do so."""
        return False

    def counted_tokens(self, params: Any) -> int:
        """Return the number of positions that a delta takes before those of the tokens that its sites attend to.

        What is put in front of keys then has the positions from 0 on, and a window that ends before them hides them.
        """
        return 0

    def agree(self, sites: Sequence[tuple[Site, Any]]) -> Refusal | None:
        """Return why sites, each with its params, cannot be those of one delta; None where they can."""
        return None

    def scales(self, params: Any) -> bool:
        """Return whether a delta acts in part by a strength, under these params."""
        return self.strength is not None

    def ends_matter(self, params: Any) -> bool:
        """Return whether the formula must know where a prompt ends while text is generated."""
        return False

    def substitutes(self, site: Site, params: Any) -> bool:
        """Return whether `apply` runs the host with other parameters (`base(x, weight=…)`) at this site."""
        return False

    def arguments(self, site: Site, params: Any) -> tuple[str, ...]:
        """Return the names of the host's arguments, besides the hidden state, that `apply` asks for at this site."""
        return ()

    def stream(self, params: Any) -> str | None:
        """Return the path of a module whose input the formula reads besides (`t.stream`), such as the residual stream
        that enters a norm; None: it reads none.

        It is looked up from the site outwards: in its parent, in that one's parent, and so on. The site's
        `stream_width` is the width of that input.
        """
        return None

    def lowers(self, site: Site, params: Any) -> bool:
        """Return whether this site works by `fold` in every forward instead of `apply`, though it is called."""
        return False

    def reads_weight(self, site: Site, params: Any) -> bool:
        """Return whether `apply` computes from the host's own weight or bias.

        A delta before it on the site, which changes the weight, would not be seen there, but would be in `fold`.
        """
        return False

    def reads_bias(self, site: Site, params: Any) -> bool:
        """Return whether `apply` computes from the host's own bias: as `reads_weight`, of deltas that change that."""
        return False

    def needs_base(self, site: Site, params: Any) -> bool:
        """Return whether the formula is about the backbone's own weight: another delta that changed it may not come
        before, even where `fold` would see it.
        """
        return False

    def folds(self, site: Site, params: Any) -> bool:
        """Return whether the delta works by `fold` here: the method says so, or nothing calls the module."""
        return site.host is not None or self.lowers(site, params)

    def unmergeable(self, site: Site, params: Any) -> str | None:
        """Return why the formula is no change of the weight here, though the method's is one elsewhere; None: it is."""
        return None

    def fold(self, site: Site, params: Any, t: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the host's own parameters with this delta folded in: own name -> new tensor.

        `weights` holds the current own parameters, without absent ones. Called only where `promises.weight` is set.
        """
        raise AssertionError(f"{self.name} promised no weight form")

    def simpler(self, params: Any) -> tuple[str, dict[str, Any]] | None:
        """Return the method and params that do the same without what only training needs; None where nothing does."""
        return None

    def simplified(self, site: Site, params: Any, t: Any) -> dict[str, Tensor]:
        """Return that simpler delta's tensors at a site, by own name. Called only where `simpler` gave something."""
        raise AssertionError(f"{self.name} has no simpler form")
