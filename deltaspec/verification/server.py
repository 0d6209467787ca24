"""Answers of a server that speaks OpenAI's completions API: which token it chooses next, and how likely that is to it.

A server gives no logits. It is asked for the one token that it would choose after several beginnings of each golden
input, at temperature 0: in one request a delta, by ids, under the name of the delta.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.storage.agreement import BASE, DIFFERS, SAME, TOLERANCES, Agreement, Verification, coarser
from deltaspec.storage.golden import Golden

MOST = 8
"""Beginnings that are asked for of each input."""
SECONDS = 300
_TOKEN_ID = re.compile(r"token_id:(\d+)")


def verify_server(
    kept: Sequence[Golden],
    url: str,
    model: nn.Module | None,
    tolerance: float | None,
    dtype: str | None,
    key: str | None,
) -> Verification:
    """Compare golden answers of deltas, each alone, with those of a server.

    `model` is one whose tokenizer says which token a text is, for servers that tell no ids. Raises DeltaSpecError
    (DS553) where the server cannot be asked, or the answers are no logits of a causal model.
    """
    alone = [golden for golden in kept if len(golden.attached) == 1 and set(golden.attached.values()) == {1.0}]
    words = cache(lambda: _words(model))
    word = cache(lambda token: words()(token))
    return Verification([_asked(golden, url, word, tolerance, dtype, key) for golden in alone])


def _asked(
    golden: Golden, url: str, word: Callable[[int], str], tolerance: float | None, dtype: str | None, key: str | None
) -> Agreement:
    [name] = golden.attached
    places = _places(golden)
    ids = golden.inputs["input_ids"]
    prompts = [ids[row, first : last + 1].tolist() for row, first, last in places]
    chosen = _complete(url, name, prompts, key)
    expected = torch.stack([golden.answer[row, last].double() for row, _, last in places])
    base = torch.stack([golden.base[row, last].double() for row, _, last in places])
    own = str(golden.answer.dtype).removeprefix("torch.")
    used = coarser(own, dtype or own)
    limit = TOLERANCES[used] if tolerance is None else tolerance
    scale = float(expected.nan_to_num(posinf=0, neginf=0).abs().max())
    slack = 2 * limit * scale  # of a logarithm of a probability, where each logit may differ by half of that
    rows = list(zip(expected, base, chosen, strict=True))
    absolute = max(_distance(logits, token, likely, word) for logits, _, (token, likely) in rows)
    from_base = max(_distance(logits, token, likely, word) for _, logits, (token, likely) in rows)
    agree = [_may_be(logits, token, word, slack) for logits, _, (token, _) in rows]
    verdict = DIFFERS
    if from_base < absolute and from_base <= slack:
        verdict = BASE
    elif absolute <= slack and all(agree):
        verdict = SAME
    relative = absolute / (2 * scale) if scale else float(absolute > 0)
    return Agreement(golden.attached, absolute, relative, sum(agree) / len(agree), verdict, used, limit)


def _places(golden: Golden) -> list[tuple[int, int, int]]:
    """Return (row, first, last position) of the beginnings to ask for, padding left out; the longest is one of them."""
    ids = golden.inputs.get("input_ids")
    if ids is None or golden.answer.dim() != 3 or golden.answer.shape[:2] != ids.shape:
        message = "golden answers that a server can be asked for are logits at each position of input_ids"
        raise _cannot(message, "verify against peft or onnx, or without --against")
    mask = golden.mask
    found = []
    for row in range(len(ids)):
        kept = torch.ones(ids.shape[1]) if mask is None else mask[row]
        places = kept.nonzero().flatten().tolist()
        if not places:
            continue
        if places != list(range(places[0], places[-1] + 1)):
            raise _cannot("the mask of a golden input has a gap, which no prompt can have", "verify without --against")
        step = max(1, -(-len(places) // MOST))
        found += [(row, places[0], last) for last in places[::-1][::step]]
    if not found:
        raise _cannot("the golden inputs are padding alone", "keep answers to inputs with tokens")
    return found


def _distance(logits: Tensor, token: Any, likely: float, word: Callable[[int], str]) -> float:
    """Return how far the likelihood that a server gives its token is from that by these logits, in nats."""
    places = _ids(logits, token, word)
    own = logits.log_softmax(-1)
    return min((abs(float(own[place]) - likely) for place in places), default=float("inf"))


def _may_be(logits: Tensor, token: Any, word: Callable[[int], str], slack: float) -> bool:
    """Return whether a token may be the largest of these logits, but for `slack`."""
    return any(float(logits[place]) >= float(logits.max()) - slack for place in _ids(logits, token, word))


def _ids(logits: Tensor, token: Any, word: Callable[[int], str]) -> list[int]:
    """Return which ids a token of a server can be: its id, or all likely ones that are written so."""
    if found := _TOKEN_ID.fullmatch(token):
        return [int(found[1])] if int(found[1]) < len(logits) else []
    likely = logits.topk(min(50, len(logits))).indices.tolist()
    return [place for place in likely if word(place) == token]


def _words(model: Any) -> Callable[[int], str]:
    """Return what writes a token of a model as text. Raises DeltaSpecError (DS553) where there is no tokenizer."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    hint = "name the model, with its tokenizer: --model"
    if not name:
        raise _cannot("this server tells tokens as texts, and nothing says which ids they are", hint)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot(f"this server tells tokens as texts, and {name} has no tokenizer", hint) from error
    return lambda token: str(tokenizer.decode([token]))


def _complete(url: str, model: str, prompts: list[list[int]], key: str | None) -> list[tuple[str, float]]:
    """Ask for the next token of each prompt; return it with the logarithm of its probability."""
    asked = {
        "model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    place = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(Request(place, json.dumps(asked).encode(), headers), timeout=SECONDS) as reply:
            answer = json.loads(reply.read())
        choices = sorted(answer["choices"], key=lambda choice: int(choice.get("index", 0)))
        parts = [choice["logprobs"] for choice in choices]
        found = [(str(part["tokens"][0]), float(part["token_logprobs"][0])) for part in parts]
    except HTTPError as error:
        said = " ".join(error.read(300).decode(errors="replace").split())
        raise _cannot(
            f"{place} says {error.code} for the model {model!r}: {said}", "serve it under this name"
        ) from None
    except (URLError, OSError, HTTPException) as error:
        raise _cannot(f"{place} cannot be reached: {error}", "check the URL, and that the server runs") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        message = f"{place} gives no completions with logprobs: {type(error).__name__}: {error}"
        raise _cannot(message, "the server must take lists of token ids as prompts, and give logprobs") from error
    if len(found) != len(prompts):
        raise _cannot(f"{place} gave {len(found)} answers for {len(prompts)} prompts", "ask the server's makers")
    return found


def _cannot(message: str, hint: str) -> DeltaSpecError:
    return DeltaSpecError([Diagnostic("DS553", message, file="<server>", suggestion=hint)])
