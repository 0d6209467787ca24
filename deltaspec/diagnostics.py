"""Findings: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Where a value lies in a document: keys and indices from the root."""

CODES: dict[str, str] = {
    # DS1: syntax
    "DS101": "unreadable file",
    "DS102": "too large",
    "DS103": "not UTF-8 text",
    "DS104": "control character",
    "DS105": "malformed YAML",
    "DS106": "malformed JSON",
    "DS107": "duplicate key",
    "DS108": "anchor, alias, tag, merge key or directive",
    "DS109": "more than one document",
    "DS110": "nested too deeply",
    "DS111": "number out of range",
    "DS112": "key is not a string",
    "DS113": "empty document",
    "DS114": "root is not a mapping",
    "DS115": "value that a document cannot hold",
    # DS2: schema
    "DS201": "unknown key",
    "DS202": "missing key",
    "DS203": "wrong type",
    "DS204": "value out of range",
    "DS205": "unknown value",
    "DS206": "unknown method",
    "DS207": "unsupported version",
    "DS208": "malformed name or text",
    "DS209": "empty list or mapping",
    "DS210": "invalid method parameters",
    "DS211": "duplicate delta name",
    "DS212": "unknown selector reference",
    "DS213": "circular selector reference",
    "DS214": "selector without a positive atom",
    "DS215": "inverted range",
    "DS216": "malformed glob",
    "DS217": "malformed regular expression",
    "DS218": "regular expression that backtracks",
    "DS219": "plug-in that cannot be loaded",
    "DS220": "too many findings",
    "DS221": "schema file out of date",
    "DS222": "table of methods out of date",
    "DS223": "derived delta of an unknown source",
    "DS224": "circular derivation",
    "DS225": "sources whose methods cannot be combined",
    # DS3: selector
    "DS302": "selector that matches no module",
    "DS303": "role that this model does not have",
    "DS304": "layers that this model does not have",
    "DS305": "combination that matches nothing",
    "DS307": "regular expression that takes too long on this model",
    "DS308": "selector that matches no parameter",
    "DS310": "lazy module without shapes",
    "DS311": "scripted module",
    "DS321": "model that cannot be found",
    "DS322": "model configuration that cannot be used",
    "DS323": "model factory that cannot be imported",
    "DS324": "model factory that fails",
    "DS350": "no default role in this model",
    "DS351": "no such module",
    # DS4: method and model
    "DS401": "another model than the spec is for",
    "DS402": "method cannot take a site",
    "DS403": "site that no forward pass reaches",
    "DS404": "bypassed site",
    "DS405": "override that applies to no site",
    "DS406": "deltas that cannot share a site",
    "DS407": "delta name taken by another spec",
    "DS408": "budget that is too small",
    "DS409": "sources that cannot be combined",
    "DS410": "text that cannot be made into tokens",
    "DS411": "model that uses the name of the deltas itself",
    "DS430": "model that cannot be copied",
    "DS431": "model that is compiled already",
    "DS432": "model that cannot be captured as symbolic",
    "DS433": "forward that cannot be pickled",
    "DS434": "unknown delta",
    "DS435": "delta that cannot be merged",
    "DS436": "deltas that cannot be attached together",
    "DS437": "delta that a forward pass bypasses",
    "DS438": "attention function that takes no more keys",
    "DS439": "input that a prompt does not fit",
    "DS440": "deltas that no forward was seen to reach",
    "DS441": "a delta that cannot be under single rows of a batch",
    "DS442": "a hidden state that does not tell the rows of the batch apart",
    "DS443": "another number of rows than the batch has",
    "DS444": "rows that are not prepared under torch.compile",
    "DS445": "a forward with rows inside another one",
    "DS446": "a strength for a delta that acts wholly or not at all",
    "DS447": "rows with prompts whose positions the model would number in a way of its own",
    "DS450": "prompt whose end cannot be told",
    "DS455": "move or cast of one of several views",
    "DS456": "switch during a forward",
    "DS457": "backward that would recompute a forward under other deltas",
    # DS5: expectation and files
    "DS501": "unexpected number of sites",
    "DS502": "unexpected number of trainable parameters in a delta",
    "DS503": "unexpected number of trainable parameters",
    "DS504": "site in what should stay untouched",
    "DS510": "no lock file",
    "DS511": "malformed lock file",
    "DS512": "another backbone than the locked one",
    "DS513": "deltas differ from the lock",
    "DS514": "delta's settings differ from the lock",
    "DS515": "sites differ from the lock",
    "DS516": "tensors differ from the lock",
    "DS517": "spec changed without effect since the lock",
    "DS520": "tensor of the model that is not finite",
    "DS521": "saved deltas that cannot be read",
    "DS522": "malformed file of saved deltas",
    "DS523": "deltas saved for another backbone",
    "DS524": "saved delta that the model does not have",
    "DS525": "missing or surplus tensor",
    "DS526": "tensor of another shape or type",
    "DS527": "saved tensor that is not finite",
    "DS528": "derived delta behind its sources",
    "DS529": "saved delta with other parameters",
    "DS530": "saved delta of a name that is taken",
    "DS531": "library's limit that is too small",
    "DS532": "delta of a library that is in use",
    "DS533": "delta of a library that cannot be taken along",
    "DS534": "delta without values",
}
"""Every code, with its title: DS1 syntax, DS2 schema, DS3 selector, DS4 method and model, DS5 expectation, files."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `line` and `column` count from 1; 0 where there is no place."""

    code: str
    message: str
    file: str = "<spec>"
    line: int = 0
    column: int = 0
    suggestion: str | None = None
    where: str = ""
    """Path inside the document (`deltas[0].target.path`); printed where there is no line."""

    def __str__(self) -> str:
        if self.line:
            place = f"{self.file}:{self.line}:{self.column}"
        else:
            place = f"{self.file}:{self.where}" if self.where else self.file
        text = f"{place}: error[{self.code}] {self.message}"
        return f"{text}\n  = help: {self.suggestion}" if self.suggestion else text


class DeltaSpecError(ValueError):
    """One or more findings, all at once, as `.diagnostics`; its text is the one the command line prints."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(str(d) for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[DeltaSpecError], tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Give the known word that `word` is most likely a misspelling of; None where none is near."""
    from difflib import get_close_matches

    candidates = {k.lower(): k for k in sorted(known, reverse=True)}
    found = get_close_matches(word[:100].lower(), list(candidates), n=1, cutoff=0.6)
    return candidates[found[0]] if found else None


def show_path(path: Sequence[str | int]) -> str:
    """Write a document path as `deltas[0].target.path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show_value(value: object) -> str:
    """Write a document's value for a message, shortened to 60 characters."""
    from json import dumps

    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    text = dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:61])
    return text if len(text) <= 60 else f"{text[:57]}…"


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sort findings by place, once each; those of one place keep the order in which they were found."""
    return sorted(dict.fromkeys(diagnostics), key=lambda d: (d.file, d.line, d.column))


class UnknownDeltaError(DeltaSpecError, KeyError):
    """A name that is not the name of a delta of this model."""

    # KeyError's own would quote the text.
    __str__ = Exception.__str__


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownDeltaError, with all findings, for names that no delta has."""
    among = known if isinstance(known, Mapping) else tuple(known)
    if unknown := [name for name in names if name not in among]:
        raise UnknownDeltaError([_unknown_delta(name, tuple(among)) for name in unknown])


def _unknown_delta(name: str, known: tuple[str, ...]) -> Diagnostic:
    near = closest(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    some = ", ".join(known[:20]) + (f" … ({len(known):,} in all)" if len(known) > 20 else "")
    return Diagnostic("DS434", f"no delta is named {name!r}", suggestion=f"{hint}known: {some or 'none'}")
