"""Mixed batches: the forwards under which every row of a batch has deltas of its own.

While a mixer is installed, each host has a dispatcher for its forward: what is attached, until rows are given for a
call, and then the region of the rows' kinds. So one installation serves every assignment, in a compiled graph, too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

from deltaspec.deltas.stacks import Kind
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host
from deltaspec.runtime.interrupts import surely
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.sockets import Forward, Socket
from deltaspec.serving.assignment import Rows, arrange, gone_since, parse_rows, to_tensors
from deltaspec.serving.binding import touched
from deltaspec.serving.dispatch import Dispatch, Entering, Kinds
from deltaspec.serving.families import Families, Family, Place, Standing
from deltaspec.serving.hosts import at_hosts, bind_hosts, refusals
from deltaspec.serving.running import Running


class Mixer(Running):
    """Runs one backbone clone on rows under different deltas."""

    def __init__(self, active: Active, shared: Shared, host: Host) -> None:
        super().__init__(shared, host)
        self._active = active
        self._gate, self._stacks, self._builder = host.gate, shared.stacks, active.builder
        self._mixed: dict[str, dict[Kinds, Forward]] = {}
        """Forwards of each host, by kinds."""
        self._dispatchers: dict[str, Dispatch] = {}
        """Dispatchers by host; the same ones at each installation, or compiled graphs would be compiled anew."""
        self._made: dict[Kinds, None] = {}  # no set: Dynamo would compile a graph anew whenever one grows
        self._mixable: set[Kind] = set()
        self._families = Families(self._builder, self._stacks)
        self._full: set[Kind] = set()
        """Kinds whose deltas are stacked, all of them."""
        self._chosen: dict[Kinds, Standing] = {}
        """By kinds: the deltas that the forwards were built from."""
        self._given: WeakSet[Rows] = WeakSet()
        self._placed: dict[Family, int] = {}
        self._installed: list[tuple[Socket, Forward | None]] = []
        """(socket, what stood in it; None: nothing attached needs it); empty while nothing is installed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixer:
        """Make the one of a copied view, which begins it: all that it remembers is made anew."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        copy.deepcopy(self._active, memo)
        return twin

    def begin(self, view: Active) -> None:
        """Start anew in a copied view."""
        Mixer.__init__(self, view, view.shared, view.host)

    @property
    def installed(self) -> bool:
        """Whether dispatchers are installed."""
        return bool(self._installed)

    @torch.inference_mode(False)
    @torch.no_grad()
    def rows(self, deltas: Sequence[Any], among: Sequence[str] = ()) -> Rows:
        """Turn an assignment into tensors, all of it checked, and build what it needs, and what `among` would need.

        Raises DeltaSpecError with all findings: unknown names (DS434), deltas that cannot be mixed (DS441).
        """
        with self._gate.lock, self._shared.lock:
            rows = parse_rows(deltas, self._shared.order)
            names = tuple(dict.fromkeys([*(name for row in rows for name in row), *among]))
            self._active.require(names)
            stacks = self._stacks
            kinds = {name: stacks.kind(name) for name in names}
            if not self._mixable.issuperset(kinds.values()):
                if findings := [finding for name in names for finding in refusals(self._builder, name)]:
                    raise DeltaSpecError(list(dict.fromkeys(findings)))
                self._mixable.update(kinds.values())
            part = [name for row in rows for name, strength in row.items() if strength != 1.0]
            self._shared.refuse_strengths(dict.fromkeys(part))
            for stack in {tuple(row) for row in rows if len(row) > 1}:
                self._shared.rivals.refuse(stack)
            self._active.derived.refresh(name for name in names if name not in self._active.active)
            stacks.ensure(names)
            found = {name: self._families.of(name) for name in names}
            own = {name: stacks.of(name) for name in names}
            given, table = arrange(rows, among, found, own, self._place)
            keys = tuple(place.key for place in given)
            new = {found[name][1].kind for name in names} - self._full
            if new:  # all of their deltas at once: a stack that grows is another shape to a compiled graph
                stacks.ensure([name for name in self._shared.planned if stacks.kind(name) in new])
                self._full |= new
            if keys not in self._made:
                self._make(keys, given, self._standing(given, names))
            device = next((tensor.device for tensor in self._host.deltas.parameters()), torch.device("cpu"))
            tensors = to_tensors(given, table, len(rows), device)
            at = {name: stack.names[name] for name, stack in own.items()}
            made = Rows(keys, **tensors, deltas=tuple(rows), places=at, stacks=own)
            self._active.residency.pin(made, names)
            self._given.add(made)
            return made

    def _place(self, family: Family) -> int:
        """Return a family's place in the order of application: that of its first delta."""
        if family not in self._placed:
            kinds = {member.kind for member in family.members.values()}
            alike = (name for name in self._shared.planned if self._stacks.kind(name) in kinds)
            self._placed[family] = min(self._shared.order[name] for name in alike)
        return self._placed[family]

    def _standing(self, given: Sequence[Place], names: Iterable[str]) -> Standing | None:
        """Return, place by place, a delta for each set of sites; None where there is none for some."""
        known = [(name, self._families.known(name)) for name in names]
        found: Standing = []
        for place in given:
            here = {of[1].scope: name for name, of in reversed(known) if of is not None and of[0] is place.family}
            if not here.keys() >= set(place.scopes):
                return None
            found.append((place, [here[scope] for scope in place.scopes]))
        return found

    def _make(self, keys: Kinds, given: Sequence[Place], standing: Standing | None) -> None:
        """Build the forwards of all hosts for families, given with deltas that stand for all of each."""
        assert standing is not None
        with self._gate.switching(with_rows=True) if self.installed else nullcontext():
            self._provide(sum(len(place.lines) for place in given))
            hosts, used = at_hosts(self._builder, standing, self._slots)
            made = bind_hosts(self._builder, hosts)
            made[""] = Entering(self, made.get("") or self._host.own_forward(""))
            for host, forward in made.items():
                self._mixed.setdefault(host, {})[keys] = forward
            self._using[keys] = tuple(self._slots[:used])
            self._made[keys] = None
            self._chosen[keys] = standing
            if self.installed:
                self.remove()
                self.install()

    def changed(self, gone: Collection[str]) -> None:
        """Follow deltas that came, or are gone for good: rows that name those are refused from now on."""
        self._placed.clear()
        for rows in list(self._given):
            if found := next((name for name in rows.places if name in gone), None):
                object.__setattr__(rows, "gone", found)
        for keys, standing in list(self._chosen.items()):
            if not any(name in gone for _, names in standing for name in names):
                continue
            given = [place for place, _ in standing]
            others = self._standing(given, self._shared.planned)
            if keys not in self._made or others is None:
                del self._chosen[keys]
                self._made.pop(keys, None)
                for mixed in self._mixed.values():
                    mixed.pop(keys, None)
                continue
            self._stacks.ensure([name for _, names in others for name in names])
            self._make(keys, given, others)

    def prepare(self) -> None:
        """Make the backbone ready for rows, unless it is. Raise DeltaSpecError (DS456) where a forward runs."""
        self._stacks.watch(self._host.deltas)
        if not self.installed:
            with self._gate.switching():
                try:
                    self._active.before_rows()
                    self.install()
                except BaseException:
                    surely(self._withdraw)
                    raise

    def end(self) -> None:
        """Leave a forward with rows, which installed its own forwards: also one that an interrupt left."""
        self._stop()
        self._withdraw()

    def _withdraw(self) -> None:
        """Take the dispatchers out, however far they were put in, and put the backbone's state back."""
        self.remove()
        if self._host.flags.frozen:
            self._active.after_rows()

    def forget(self) -> None:
        """Forget all that holds tensors, after they moved; nothing is installed."""
        self._mixed.clear()
        self._dispatchers.clear()
        self._made.clear()
        self._chosen.clear()
        self._placed.clear()
        self._full.clear()
        self._families.forget()

    def install(self) -> None:
        """Install the dispatchers, over what is attached."""
        if self.installed:
            return
        builder, attached = self._builder, self._active.forwards()
        # What is attached where no row has anything steps aside, too.
        for host in self._mixed.keys() | {""} | touched(builder, self._active.active):
            socket = self._host.socket(host)
            if any(socket is known for known, _ in self._installed):
                continue  # a module that stands in two places
            before = attached.get(socket)
            if (dispatch := self._dispatchers.get(host)) is None:
                dispatch = Dispatch(self, self._host.own_forward(host), self._mixed.setdefault(host, {}))
                self._dispatchers[host] = dispatch
            dispatch.plain = before or dispatch.own
            self._installed.append((socket, before))
            socket.write(dispatch)
            socket.enter()
        self._active.guard.take()

    def remove(self) -> bool:
        """Take the dispatchers out; return whether there were some."""
        installed = self.installed
        for socket, before in self._installed:
            if before is None:
                socket.leave()
            else:
                socket.write(before)
        self._installed.clear()
        if installed:
            self._active.guard.take()
        return installed

    @contextmanager
    def using(
        self, deltas: Sequence[Any] | Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool = False
    ) -> Iterator[None]:
        """Run what is called inside with these rows; `args` and `kwargs` are those of the call.

        `keep` is for many forwards: what rows are under is gathered once, and takes memory until the end.

        Raises DeltaSpecError: see `rows`; DS443 for a batch of another size, DS445 for a call inside another one.
        """
        self._active.follow_others()
        with self._gate.alone():
            if not isinstance(deltas, Rows):
                rows = self.rows(deltas)
            elif deltas.gone is not None:
                raise UnknownDeltaError([gone_since(deltas.gone)])
            elif deltas.kinds in self._made and self._is_current(deltas):
                rows = deltas
            else:
                rows = self.rows(deltas.deltas)
            self._try(rows.kinds, self._mixed, args, {} if keep else kwargs)
            installed = self.installed
            try:
                self._start(rows, args, kwargs, keep)
                self._note_displaced()
                if not installed:
                    self._active.before_rows()
                    self.install()
                yield
            finally:
                surely(self._stop if installed else self.end)

    def call(self, deltas: Sequence[Any] | Rows, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run the model with a delta a row."""
        if torch.compiler.is_compiling():
            return self._traced_call(deltas, forward, args, kwargs)
        with self.using(deltas, args, kwargs):
            return forward(*args, **kwargs)

    def _traced_call(self, rows: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model with rows inside a trace, which can install nothing."""
        if not isinstance(rows, Rows):
            raise RuntimeError("deltaspec DS444: under torch.compile pass deltas=c.rows([...]), made outside of it")
        if rows.gone is not None:
            raise RuntimeError(f"deltaspec DS434: {rows.gone!r} was removed since c.rows([...]) was called")
        if not self.installed or rows.kinds not in self._made:
            raise RuntimeError("deltaspec DS444: the model was detached or moved since: make c.rows([...]) again")
        if self._stacks.displaced.count:
            raise RuntimeError("deltaspec DS444: deltas have other tensors than those that a compiled graph reads "
                               "(functional_call, a parametrization, new parameters): call the model itself with rows, "
                               "or make c.rows([...]) again where they stay")  # fmt: skip
        self._start(rows, args, kwargs)
        output = forward(*args, **kwargs)
        self._stop()
        return output

    @torch.inference_mode(False)
    @torch.no_grad()
    def _is_current(self, rows: Rows) -> bool:
        """Return whether the deltas are still where they were when the rows were made."""
        stacks = self._stacks
        with self._shared.lock:
            self._active.require(rows.places)
            stacks.ensure(rows.places)
            return all(
                stacks.of(name) is rows.stacks[name] and rows.stacks[name].names[name] == place
                for name, place in rows.places.items()
            )
