"""The model that a command line names: a directory, a config.json, a hub id or `package.module:factory`.

Configurations are built on the meta device, so no weights are needed. Code from a hub is never run; a factory is the
caller's own code, imported with the current directory on the path.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from deltaspec.backbone.hub import is_cached, reachable, refusal
from deltaspec.backbone.load_report import quiet, refuse_lacking
from deltaspec.backbone.untrusted import kernel_in, no_code, no_questions
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import brief, closest
from deltaspec.documents.nearby import did_you_mean
from deltaspec.names.paths import is_inside

_FACTORY = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
_OWN_CODE = "this configuration needs model code of its own, which is never run from here"
_WAYS = "name a directory with a config.json, a config.json, a hub id (org/name) or package.module:factory"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of the model that a configuration describes, where that is not all that it names itself."""

    kind: str | None = None
    """Class, or Auto class, of transformers in place of the one that the configuration names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of the configuration that are other: `{"num_labels": 3}`."""
    weights: bool = False
    """Load the weights, too, which must lie beside the configuration."""
    factories: bool = True
    """Whether the reference may be a factory, whose code runs. One that a file names may not: nobody here wrote it."""
    dtype: str | None = None
    """dtype in which they are loaded; their own, where it is left out."""
    likely: str | None = None
    """Class that deltas were saved for: it is in place of the one that the configuration names, where it is for it."""


_AS_NAMED = Wanted()
_ANOTHER = "name the base model that the adapter was trained on"
_VALUES = "check its values, or load the model by a factory: package.module:factory"


def model_from(reference: str, wanted: Wanted = _AS_NAMED) -> nn.Module:
    """Build the model that a reference names, on the meta device where possible and no weights are wanted.

    A factory decides alone what it makes. Raises DeltaSpecError (DS321 to DS324) with one finding about the reference.
    """
    if "\0" not in reference and os.path.isdir(os.path.expanduser(reference)):
        return _from_directory(reference, os.path.expanduser(reference), wanted)
    if "\0" not in reference and os.path.isfile(os.path.expanduser(reference)):
        return _from_config_file(reference, os.path.expanduser(reference), wanted)
    if wanted.factories and (found := _FACTORY.fullmatch(reference)):
        made = _from_factory(reference, found[1], found[2], weights=wanted.weights)
        return made if wanted.dtype is None else made.to(getattr(torch, wanted.dtype))
    if reference.endswith((".json", ".py")) or not _HUB_ID.fullmatch(reference):
        _fail("DS321", "there is no such file or directory", reference, did_you_mean(reference, _WAYS))
    return _from_hub(reference, wanted)


def _from_directory(reference: str, path: str, wanted: Wanted) -> nn.Module:
    file = os.path.join(path, "config.json")
    if os.path.isfile(file):
        return _from_config_file(reference, file, wanted)
    hint = _WAYS
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        hint = "this directory holds a PEFT adapter: name the directory of its base model"
    _fail("DS321", "this directory has no config.json", reference, hint)


def _from_config_file(reference: str, file: str, wanted: Wanted) -> nn.Module:
    try:
        with open(file, encoding="utf-8") as stream:
            data = json.load(stream)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        _fail("DS322", f"{os.path.basename(file)} cannot be read: {brief(error)}", reference, _WAYS)
    if not isinstance(data, dict) or "model_type" not in data:
        message = f"{os.path.basename(file)} names no model_type, so it is no configuration of a transformers model"
        _fail("DS322", message, reference, _WAYS)
    _refuse_kernels(reference, data)
    return _build(reference, file, wanted, local=True)


def _from_hub(reference: str, wanted: Wanted) -> nn.Module:
    if not is_cached(reference) and not reachable():
        message = "no such file or directory here, and the hub cannot be reached"
        hint = f"check the name and the network, or fetch it where there is one (hf download {reference}), or {_WAYS}"
        _fail("DS321", message, reference, did_you_mean(reference, hint))
    return _build(reference, reference, wanted, local=False)


def _build(reference: str, source: str, wanted: Wanted, local: bool) -> nn.Module:
    """Build the class that a configuration names, on the meta device, or with its weights where they are wanted."""
    try:
        import transformers
    except ModuleNotFoundError:
        _fail("DS322", "transformers is not installed", reference, "pip install 'deltaspec[transformers]'")
    with quiet(progress=not local), no_code():
        try:
            config = transformers.AutoConfig.from_pretrained(
                source, trust_remote_code=False, local_files_only=local, **wanted.settings
            )
        except Exception as error:  # whatever the hub's client or a configuration class raises
            if not local and (said := refusal(error, reference)) is not None:
                hint = did_you_mean(reference, f"{said[1]}, or {_WAYS}")
                _fail("DS321", f"no such file or directory here, and {said[0]}", reference, hint)
            message = f"transformers cannot use this configuration: {brief(error)}"
            _fail("DS322", _OWN_CODE if _remedy(error) else message, reference, _remedy(error) or _WAYS)
        _refuse_kernels(reference, config)
        named = wanted.kind or _fitting(wanted.likely, config) or getattr(config, "architectures", None) or "AutoModel"
        named = [named] if isinstance(named, str) else named
        maker = _model_class(reference, str(named[0]), config)
        try:
            with torch.device("meta"):
                model = maker(config)
        except Exception as error:  # a configuration can fail in any line of any model's constructor
            message = f"{named[0]} cannot be built from this configuration: {brief(error)}"
            hint = _ANOTHER if wanted.kind else _VALUES
            _fail("DS322", _OWN_CODE if _remedy(error) else message, reference, _remedy(error) or hint)
        if wanted.weights:
            return _weighted(reference, source, str(named[0]), config, local, wanted.dtype)
    assert isinstance(model, nn.Module)
    return model.eval()


def _refuse_kernels(reference: str, config: Any) -> None:
    """Refuse a configuration that names a kernel of a hub: to load it is to run its code."""
    if (kernel := kernel_in(config)) is not None:
        message = f"this configuration names the kernel {kernel!r} of a hub, whose code is never run from here"
        _fail("DS322", message, reference, "name an attention of transformers (sdpa, eager), or write a factory")


def _model_class(reference: str, name: str, config: Any) -> Callable[[Any], Any]:
    import transformers

    found: Any = getattr(transformers, name, None)
    if name.startswith("AutoModel") and found is not None:
        return partial(found.from_config, trust_remote_code=False)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found._from_config  # unlike the constructor, it follows the configuration's dtype
    siblings = type(config).__name__.removesuffix("Config")
    near = closest(name, (known for known in dir(transformers) if known.startswith(siblings)))
    message = f"transformers {transformers.__version__} has no model class {name}, which `architectures` names"
    _fail("DS322", message, reference, f"did you mean {near}?" if near else "write a factory, package.module:factory")


def _fitting(name: str | None, config: Any) -> str | None:
    """Return the name of a class where transformers has it, and for this configuration."""
    import transformers

    found: Any = None if name is None else getattr(transformers, name, None)
    fits = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return name if fits and found.config_class is type(config) else None


def _remedy(error: Exception) -> str | None:
    """Return the way out where a model needs code from a hub: transformers says so in a ValueError's text alone."""
    if "trust_remote_code" in str(error):
        return "write a factory that loads it, and name it as package.module:factory"
    return None


def _weighted(reference: str, source: str, name: str, config: Any, local: bool, dtype: str | None) -> nn.Module:
    """Load a model with its weights; of a configuration file, those that lie beside it. Raises DeltaSpecError."""
    import transformers

    place = os.path.dirname(os.path.abspath(source)) if local else source
    options = {"config": config, "trust_remote_code": False, "dtype": dtype or "auto", "output_loading_info": True}
    try:
        made, report = getattr(transformers, name).from_pretrained(place, **options)
    except Exception as error:  # whatever a file of weights, the hub's client or a model's class raises
        said = None if local else refusal(error, reference)
        message, hint = said or (brief(error), "name a directory with weights, as save_pretrained writes it")
        _fail("DS322", f"the weights of this {name} cannot be loaded: {message}", reference, hint)
    assert isinstance(made, nn.Module)
    refuse_lacking(reference, made, report["missing_keys"])
    return made.eval()


def _from_factory(reference: str, module_name: str, attribute: str, *, weights: bool) -> nn.Module:
    with _current_directory_first(), no_questions():
        made: Any = _imported(reference, module_name)
        for step in attribute.split("."):
            if not hasattr(made, step):
                near = closest(step, (name for name in dir(made) if not name.startswith("_")))
                message = f"{getattr(made, '__name__', module_name)} has no {step}"
                _fail("DS323", message, reference, f"did you mean {near}?" if near else None)
            made = getattr(made, step)
        if isinstance(made, nn.Module):
            return made
        if not callable(made):
            kind = f"an object of class {type(made).__name__}"
            _fail("DS324", f"{attribute} is {kind}, neither a module nor a factory", reference)
        try:
            with torch.device("cpu" if weights else "meta"), quiet(progress=True):
                model = made()
        except (Exception, SystemExit):
            # Some constructors compute with values; their failure on real weights is the one that counts.
            try:
                with quiet(progress=True):
                    model = made()
            except (Exception, SystemExit) as error:  # the caller's own code
                message = f"{attribute}() failed: {brief(error)}{_where(error)}"
                _fail("DS324", message, reference, "a factory is called without arguments and gives a torch.nn.Module")
    if not isinstance(model, nn.Module):
        kind = f"an object of class {type(model).__name__}"
        _fail("DS324", f"{attribute}() gave {kind}, not a torch.nn.Module", reference)
    return model


def _imported(reference: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the caller's own code
        if isinstance(error, ModuleNotFoundError) and error.name is not None and is_inside(name, error.name):
            hint = "it is looked for in the current directory and in the environment that deltaspec runs in"
            _fail("DS323", f"there is no module {error.name}", reference, hint)
        _fail("DS323", f"importing {name} failed: {brief(error)}{_where(error)}", reference)


@contextmanager
def _current_directory_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _where(error: BaseException) -> str:
    """Name the innermost line of the caller's own code that an exception came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    return f" ({os.path.relpath(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _fail(code: str, message: str, reference: str, suggestion: str | None = None) -> NoReturn:
    place = reference[:300] or "(no model)"
    raise DeltaSpecError([Diagnostic(code, message, place, suggestion=suggestion)]) from None
