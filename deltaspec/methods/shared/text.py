"""Token ids of a text, by a tokenizer of transformers."""

from __future__ import annotations

import os


class TextError(Exception):
    """A text that cannot be tokenised: why, and the way out."""

    def __init__(self, reason: str, suggestion: str) -> None:
        super().__init__(reason)
        self.reason, self.suggestion = reason, suggestion


def ids_of(text: str, tokenizer: str) -> list[int]:
    """Return the ids that a tokenizer (a directory or an id on the hub) gives a text, special tokens included.

    A hub is asked only for what is not on this machine yet; code from it is never run. Raises TextError.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        reason = "transformers, which reads tokenizers, is not installed"
        raise TextError(reason, "pip install 'deltaspec[transformers]'") from None
    from deltaspec.backbone.hub import reachable
    from deltaspec.backbone.untrusted import no_code

    path = os.path.expanduser(tokenizer)
    local = os.path.isdir(path)
    try:
        load = transformers.AutoTokenizer.from_pretrained
        with no_code():
            try:
                made = load(path, trust_remote_code=False, local_files_only=True)
            except (OSError, ValueError):
                is_path = local or "\\" in tokenizer or tokenizer.startswith((".", "/", "~"))
                if is_path or not reachable():
                    raise
                made = load(tokenizer, trust_remote_code=False)
        ids = made(text)["input_ids"]
    except Exception as error:  # whatever a tokenizer's files or the hub's client raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        way_out = "name a directory that tokenizer.save_pretrained wrote or an id on the hub, or give token_ids"
        raise TextError(f"the tokenizer {tokenizer!r} cannot be used: {first[:300]}", way_out) from error
    if not ids:
        raise TextError(f"the tokenizer {tokenizer!r} makes no token of the text", "give a longer text")
    return [int(i) for i in ids]
