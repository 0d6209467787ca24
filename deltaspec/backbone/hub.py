"""The hub as its client finds it: whether it can be asked at all, and what its refusals mean."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from deltaspec.diagnostics.wording import brief, one_line

_LOG_IN = "log in: hf auth login, or set HF_TOKEN"


def is_cached(reference: str) -> bool:
    """Return whether the configuration of a model on a hub lies in the hub's cache here."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        return isinstance(try_to_load_from_cache(reference, "config.json"), str)
    except (ModuleNotFoundError, HFValidationError):
        return False


def reachable() -> bool:
    """Look up the hub's name, since its client retries for half a minute; behind a proxy, leave it to the client."""
    if getproxies():
        return True
    try:
        from huggingface_hub.constants import ENDPOINT

        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except ModuleNotFoundError:
        return True  # transformers is missing too, which is the better message
    except OSError:
        return False
    return True


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the reports of the hub's client off standard error; a terminal still sees its bars."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, without = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not without:
            enable_progress_bars()


def refusal(error: BaseException, repo: str, revision: str | None = None) -> tuple[str, str] | None:
    """Return what an exception of the hub's client says of a repository, and the way out; None for any other one.

    transformers wraps it in one of its own, whose text is about something else.
    """
    from huggingface_hub import constants, errors

    causes = tuple(_causes(error))

    def is_from(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    fetch = f"fetch it where there is a network, since the cache is read without one: hf download {repo}"
    if is_from(errors.GatedRepoError):
        ask = f"ask for access at {constants.ENDPOINT}/{repo}, and {_LOG_IN}"
        return "the hub gives it only to those whom its owner lets in", ask
    if is_from(errors.RevisionNotFoundError):
        return f"the hub's repository has no revision {revision or 'main'!r}", "name a branch, a tag or a commit of it"
    if is_from(errors.RepositoryNotFoundError):
        hint = f"check the id; if it is private, {_LOG_IN}"
        return "the hub has no such repository, or shows it to its owner alone", hint
    if is_from(errors.HFValidationError):
        return f"it is no id of a hub: {one_line(str(error))}", "ids are org/name, org/name/folder, org/name@revision"
    if constants.HF_HUB_OFFLINE and is_from(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return "it is not in the hub's cache, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, or {fetch}"
    if is_from(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror):
        why = next((cause for cause in reversed(causes) if not isinstance(cause, errors.EntryNotFoundError)), error)
        message = f"it is not in the hub's cache, and the hub ({constants.ENDPOINT}) cannot be reached: {brief(why)}"
        return message, f"check the network, HTTPS_PROXY and HF_ENDPOINT; or {fetch}"
    if is_from(errors.EntryNotFoundError):
        return "the hub's repository has no such file", "look into the repository, and name a folder that has it"
    if is_from(errors.HfHubHTTPError):
        return f"the hub refuses it: {brief(error)}", f"try again; if it is private, {_LOG_IN}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
