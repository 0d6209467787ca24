"""Every method past one machine: one backbone and a library of deltas, served by Ray Serve with a delta for each row.

`Replica` (ray_replica.py) computes batches; `Front` answers over HTTP. `make check-ray`, or
`python examples/serving/ray_serve.py --help`; RAY.md says what each part is for.
"""

import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import click
import ray
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from ray_replica import BATCH, Generate, Replica, Row, Score, Unfit
from transformers import AutoModelForCausalLM, PreTrainedModel

import deltaspec

QUEUE = 128
"""Requests that may wait for a replica; beyond, they are turned away."""
RETRY_AFTER = 1
"""Seconds after which who was turned away may come again."""
ATTEMPTS = 5
"""How many replicas may die under one request."""


async def answered(answer: Awaitable[Any]) -> Any:
    """Wait for an answer, and say in terms of HTTP why there is none."""
    try:
        return await answer
    except BackPressureError as full:
        raise turned_away(full.message) from full
    except (deltaspec.DeltaSpecError, Unfit) as error:
        cause = getattr(error, "cause", error)  # as the replica raised it, without Ray's account of where
        raise HTTPException(404 if isinstance(cause, KeyError) else 422, str(cause)) from error


def turned_away(why: str) -> HTTPException:
    """Return the response to who may come again."""
    return HTTPException(503, why, {"Retry-After": str(RETRY_AFTER)})


# What stands below is copied by value where it stands, so all that it needs stands above.
api = FastAPI(title="One backbone, a library of deltas")


@serve.ingress(api)
class Front:
    """Answers over HTTP: finds a replica for each request, and another one where that dies."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas

    @api.post("/score")
    async def score(self, row: Score) -> dict[str, Any]:
        """Return the logits of the next token."""
        died: RayActorError | None = None
        for _ in range(ATTEMPTS):
            try:
                return await answered(self.near(row).score.remote(row))
            except RayActorError as error:  # nothing was changed there, so the request may run again
                died = error
        raise turned_away(f"{ATTEMPTS} replicas died under this request") from died

    @api.post("/generate")
    async def generate(self, row: Generate) -> StreamingResponse:
        """Return a line of JSON for each token as it comes, `{"token": 17}`, and `{"done": true}` at the end."""
        tokens = self.tokens(row)
        first = await answered(anext(tokens))  # what is refused is refused before there is a response

        async def lines() -> AsyncIterator[str]:
            yield json.dumps({"token": first}) + "\n"
            try:
                async for token in tokens:
                    yield json.dumps({"token": token}) + "\n"
            except Exception as error:  # the status was sent long ago: the last line has to say it
                yield json.dumps({"error": str(error)}) + "\n"
                raise
            yield json.dumps({"done": True}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def tokens(self, row: Generate) -> AsyncIterator[int]:
        """Give the tokens; where a replica dies, another one's, without those that were given before."""
        given: list[int] = []
        died: RayActorError | None = None
        for _ in range(ATTEMPTS):
            place = 0
            try:
                async for token in self.near(row).options(stream=True).generate.remote(row):
                    if place == len(given):
                        given.append(token)
                        yield token
                    elif token != given[place]:  # no text that two replicas disagree about is sent as one
                        raise RuntimeError(f"a second replica gave {token} as token {place}, not {given[place]}")
                    place += 1
                return
            except RayActorError as error:
                died = error
        raise turned_away(f"{ATTEMPTS} replicas died under this request") from died

    def near(self, row: Row) -> DeploymentHandle:
        """Return the replicas, those first that have the row's first delta in memory."""
        return self.replicas.options(multiplexed_model_id=next(iter(row.deltas), ""))


def application(
    backbone: Callable[[], PreTrainedModel],
    library: str,
    replicas: int = 2,
    replica: type[Replica] = Replica,
    options: Mapping[str, Any] = {"num_cpus": 1},
    queue: int = QUEUE,
) -> serve.Application:
    """Return what `serve.run` takes; `options` are what Ray gives each replica, such as `{"num_gpus": 1}`."""
    quiet = LoggingConfig(enable_access_log=False)
    deltas = serve.deployment(
        replica,
        name="deltas",
        num_replicas=replicas,
        max_ongoing_requests=4 * BATCH,
        max_queued_requests=queue,
        ray_actor_options=dict(options),
        logging_config=quiet,
    )
    front = serve.deployment(
        Front,
        name="front",
        max_ongoing_requests=10_000,  # the queue of the replicas is the one that fills
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
    )
    return front.bind(deltas.bind(backbone, library))


@click.command()
@click.option("--model", required=True, help="Directory or hub id of a causal language model.")
@click.option("--library", required=True, help="Directory of saved deltas; all machines must see it.")
@click.option("--replicas", default=2, show_default=True)
@click.option("--address", help="A running Ray cluster, such as auto; else one on this machine alone.")
@click.option("--port", default=8000, show_default=True)
def command(model: str, library: str, replicas: int, address: str | None, port: int) -> None:
    """Serve a library of deltas on one backbone."""
    if address is None:
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1")
    else:
        ray.init(address)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    backbone = functools.partial(AutoModelForCausalLM.from_pretrained, model)
    serve.run(application(backbone, library, replicas), blocking=True)


if __name__ == "__main__":
    command()
