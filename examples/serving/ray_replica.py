"""What one process of the serving does: the backbone, a library of deltas, and batches with a delta for each row."""

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt
from ray import serve
from serving_queue import pad
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import deltaspec

HELD = 16
"""The most deltas in the memory of one replica."""
BATCH = HELD // 2
"""The most deltas in one batch. Scoring and generating have one each at a time, and both fit."""


class Row(BaseModel, extra="forbid"):
    """What all requests say: the tokens, and what they are to be computed under."""

    ids: list[NonNegativeInt] = Field(min_length=1)
    deltas: dict[str, FiniteFloat] = Field(default={}, max_length=BATCH)
    """Strengths by the names of deltas, 1 for what was trained. None: the bare backbone."""


class Score(Row):
    """Ask for the logits of the token that comes next."""

    candidates: list[NonNegativeInt] = []
    """The tokens that are asked for. None: all."""


class Generate(Row):
    """Ask for the tokens that come next, the likeliest each time."""

    new_tokens: int = Field(default=16, ge=1, le=1024)


class Unfit(ValueError):
    """A request that this backbone cannot answer."""


def size(rows: list[Row]) -> int:
    """Count what of a batch's limit these rows take: a place for each delta, and one for a row without."""
    return sum(max(1, len(row.deltas)) for row in rows)


class Replica:
    """The backbone and the deltas in use, in one process."""

    def __init__(self, backbone: Callable[[], PreTrainedModel], library: str) -> None:
        # All deltas are the library's: the one it is compiled with goes at once.
        spec = {"deltaspec": 1, "deltas": [{"name": "none", "method": "bitfit", "target": {"type": "Linear"}}]}
        self.c = deltaspec.compile(backbone().eval(), spec).remove("none")
        self.library = self.c.library(library, limit=HELD)
        self.generating = self.c.view()  # for the other thread: the same weights and deltas
        self.scorer, self.generator = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def held(self) -> tuple[str, tuple[str, ...]]:
        """Return the name of this replica, and the names of the deltas in its memory."""
        return serve.get_replica_context().replica_id.unique_id, self.library.loaded

    async def score(self, row: Score) -> dict[str, Any]:
        """Answer one request, in a batch with others."""
        await self.admit(row, tokens=row.candidates)
        # Serve would split a batch by the delta that its requests were routed by: in an empty context they have none.
        scores = asyncio.get_running_loop().create_task(self.scores(row), context=contextvars.Context())
        return {"scores": await scores, "replica": serve.get_replica_context().replica_id.unique_id}

    async def generate(self, row: Generate) -> AsyncIterator[int]:
        """Answer one request token by token, in a batch with others."""
        await self.admit(row, more=row.new_tokens)
        async for token in contextvars.Context().run(self.tokens, row):
            yield token

    async def admit(self, row: Row, tokens: Sequence[int] = (), more: int = 0) -> None:
        """Have the deltas of a row in memory, and raise for what is wrong with it: its batch must not fail for it."""
        if unknown := [name for name in row.deltas if name not in self.library]:
            self.library.load(*unknown)  # raises UnknownDeltaError, and says what there is
        config = self.c.config
        if (largest := max(*row.ids, *tokens, 0)) >= config.vocab_size:
            raise Unfit(f"token {largest} is not in the vocabulary of {config.vocab_size}")
        if (length := len(row.ids) + more) > config.max_position_embeddings:
            raise Unfit(f"{length} tokens are more than the {config.max_position_embeddings} that this model takes")
        for name in row.deltas:
            await self.hold(name)
        if len(row.deltas) > 1 or any(strength != 1 for strength in row.deltas.values()):
            try:
                await self.scoring(self.c.rows, [row.deltas])
            except deltaspec.DeltaSpecError:
                raise
            except ValueError as error:  # a number that is no strength
                raise Unfit(str(error)) from error

    @serve.multiplexed(max_num_models_per_replica=HELD)
    async def hold(self, name: str) -> str:
        """Load a delta and check that it can be in mixed batches; Serve then routes here what asks for it."""
        await self.scoring(self.c.rows, [name])
        return name  # the library's own limit drops what was not used for longest

    async def scoring(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run in the thread of the scoring view, so that this one stays free for new requests."""
        return await asyncio.get_running_loop().run_in_executor(self.scorer, call, *args)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005, batch_size_fn=size)
    async def scores(self, rows: list[Score]) -> list[list[float]]:
        """Compute a batch of whatever deltas."""
        logits = await self.scoring(self.logits, rows)
        chosen = (one[row.candidates] if row.candidates else one for row, one in zip(rows, logits, strict=True))
        return [one.tolist() for one in chosen]

    @torch.no_grad()
    def logits(self, rows: list[Score]) -> Tensor:
        """Return the logits of each row's next token, `[rows, vocabulary]`: one forward, a delta for each row."""
        # Padded on the right, so that every token has the position that it has alone.
        batch = pad([torch.tensor(row.ids) for row in rows])
        found = self.c(**batch, deltas=[row.deltas or None for row in rows]).logits
        return found[torch.arange(len(rows)), batch["attention_mask"].sum(1) - 1]

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02, batch_size_fn=size)
    async def tokens(self, rows: list[Generate]) -> AsyncIterator[list[Any]]:
        """Generate for a batch of whatever deltas; a step gives a token a row, or says that the row is at its end."""
        loop, steps = asyncio.get_running_loop(), Steps(asyncio.get_running_loop())
        done = loop.run_in_executor(self.generator, self.generate_rows, rows, steps)
        done.add_done_callback(lambda done: steps.end())  # on an error, too
        left = [row.new_tokens for row in rows]
        while (step := await steps.queue.get()) is not None:
            yield [token if left[place] > 0 else StopIteration for place, token in enumerate(step)]
            left = [0 if token in self.ends else count - 1 for token, count in zip(step, left, strict=True)]
        await done

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        end = self.c.generation_config.eos_token_id
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)

    def generate_rows(self, rows: list[Generate], steps: BaseStreamer) -> None:
        """Generate, a delta for each row."""
        prompts = [torch.tensor(row.ids) for row in rows]
        ones = [torch.ones_like(prompt) for prompt in prompts]
        self.generating.generate(
            pad_sequence(prompts, batch_first=True, padding_side="left"),
            attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
            deltas=[row.deltas or None for row in rows],
            max_new_tokens=max(row.new_tokens for row in rows),
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            streamer=steps,
        )


class Steps(BaseStreamer):
    """Hands the tokens of each step from the thread that generates to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.queue, self.prompted = loop, asyncio.Queue[list[int] | None](), False

    def put(self, value: Tensor) -> None:
        """Take the prompts, and then a token a row each time."""
        if self.prompted:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, value.tolist())
        self.prompted = True

    def end(self) -> None:
        """Say that no more come."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, None)
