"""A client of the serving that comes again when it is told to, and a way to end replicas, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import ray
from ray.util import list_named_actors
from ray_replica import Row


def nothing(count: int) -> None:
    """Hear of what is done, and do nothing."""


async def ask(session: aiohttp.ClientSession, url: str, row: Row) -> dict[str, Any]:
    """Ask for scores; whoever is turned away comes again after the time that was said."""
    while True:
        async with session.post(f"{url}/score", json=row.model_dump()) as response:
            if response.status != 503:
                response.raise_for_status()
                return await response.json()
            wait = float(response.headers["Retry-After"])
        await asyncio.sleep(wait)


async def ask_all(
    url: str, rows: Iterable[Row], at_once: int, during: Callable[[int], Any] = nothing
) -> list[dict[str, Any]]:
    """Ask for all, so many at once; `during` hears how many are answered."""
    free, done = asyncio.Semaphore(at_once), 0

    async def one(session: aiohttp.ClientSession, row: Row) -> dict[str, Any]:
        nonlocal done
        async with free:
            answer = await ask(session, url, row)
        done += 1
        during(done)
        return answer

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(one(session, row) for row in rows))


async def stream(
    session: aiohttp.ClientSession, url: str, row: Row, count: int, during: Callable[[int], Any] = nothing
) -> list[int]:
    """Generate, and hear of each token as it comes."""
    tokens: list[int] = []
    async with session.post(f"{url}/generate", json=row.model_dump() | {"new_tokens": count}) as response:
        response.raise_for_status()
        async for line in response.content:
            said = json.loads(line)
            if "done" in said:
                return tokens
            tokens.append(said["token"])
            during(len(tokens))
    raise EOFError(f"the stream ended after {len(tokens)} tokens")


def kill_replica(name: str = "") -> str:
    """End the process of one replica of the deltas at once, as a crash would."""
    for actor in list_named_actors(all_namespaces=True):
        if "#deltas#" in actor["name"] and actor["name"].endswith(name):
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
            return actor["name"]
    raise LookupError("there is no replica to kill")
