"""Deltas on two replicas of Ray Serve, over HTTP on loopback. `make check-ray`; not part of the ordinary suite."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import ray
import ray_tiny
import torch
from ray import cloudpickle, serve
from ray_client import ask, ask_all, kill_replica, stream
from ray_replica import HELD, Row, Score
from ray_serve import application

import deltaspec

PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
QUEUE = 32
CLOSE = 1e-5


@dataclass
class Served:
    """What runs, and the model that its library came from, to compare with."""

    alone: deltaspec.CompiledModel

    def __post_init__(self) -> None:
        self.known: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        return [*self.alone.deltas]

    @torch.no_grad()
    def logits(self, row: Row) -> torch.Tensor:
        """Compute a row by itself: its deltas attached, one forward, no rows, no library."""
        key = row.model_dump_json()
        if key not in self.known:
            with self.alone.only(row.deltas):
                self.known[key] = self.alone(input_ids=torch.tensor([row.ids])).logits[0, -1]
        return self.known[key]

    def text(self, row: Row, count: int) -> list[int]:
        """Generate for a row by itself."""
        with self.alone.only(row.deltas):
            ids = torch.tensor([row.ids])
            out = self.alone.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return out[0, len(row.ids) :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("library") / "deltas"
    alone = ray_tiny.trained(ray_tiny.backbone())
    alone.save(folder)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(ray_tiny.backbone, str(folder), options={"num_cpus": 0.5}, queue=QUEUE))
        yield Served(alone)
        serve.shutdown()
    finally:
        ray.shutdown()


def with_session(run: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with aiohttp.ClientSession() as session:
            return await run(session)

    return asyncio.run(whole())


def replicas() -> dict[str, tuple[str, ...]]:
    """Return the deltas in the memory of each of the two replicas."""
    handle, found = serve.get_deployment_handle("deltas", "default"), {}
    end = time.monotonic() + 120  # a replica that died is started anew
    while len(found) < 2:
        assert time.monotonic() < end, f"only {len(found)} replica answers"
        name, held = handle.held.remote().result()
        found[name] = held
    return found


def test_2000_mixed_requests_and_a_replica_that_dies(served: Served) -> None:
    rows = ray_tiny.requests(served.names, 2000)
    killed = []

    def during(done: int) -> None:
        if done == 700:
            killed.append(kill_replica())

    started = time.perf_counter()
    answers = asyncio.run(ask_all(URL, rows, at_once=48, during=during))
    took = time.perf_counter() - started
    assert len(killed) == 1
    assert len(answers) == 2000
    far = torch.stack([served.logits(row) for row in rows])
    got = torch.tensor([answer["scores"] for answer in answers])
    errors = (got - far).abs().amax(dim=1)
    assert errors.max() < CLOSE, f"{int((errors >= CLOSE).sum())} of 2000 are wrong"
    # A wrong delta would have been seen: no other mixture gives nearly these numbers for the same text.
    mixtures = {json.dumps(row.deltas): row.deltas for row in rows}.values()
    texts = {tuple(row.ids): row.ids for row in rows}.values()
    for ids in texts:
        all_ways = torch.stack([served.logits(Score(ids=ids, deltas=deltas)) for deltas in mixtures])
        apart = torch.cdist(all_ways, all_ways, p=torch.inf).fill_diagonal_(torch.inf).min()
        assert apart > 100 * CLOSE
    answered_by = Counter(answer["replica"] for answer in answers)
    print(f"\n2,000 requests, {len(mixtures)} mixtures, {took:.0f} s: {answered_by}, largest error {errors.max():.1e}")
    assert len(answered_by) >= 2


def test_memory_is_bounded(served: Served) -> None:
    replicas()  # both are there
    asyncio.run(ask_all(URL, [Score(ids=[5, 6], deltas={name: 1.0}) for name in served.names * 2], at_once=8))
    held = replicas()
    print(f"\nheld of {len(served.names)}: {[len(names) for names in held.values()]}, at most {HELD}")
    assert len(served.names) > HELD
    assert all(len(names) <= HELD for names in held.values())
    assert any(held.values())


def test_requests_go_where_their_delta_is(served: Served) -> None:
    row = Score(ids=[5, 6, 7], deltas={"lora-0": 1.0})

    async def one_after_another(session: aiohttp.ClientSession) -> set[str]:
        await ask(session, URL, row)
        await asyncio.sleep(3)  # replicas tell the controller each second what they hold
        return {(await ask(session, URL, row))["replica"] for _ in range(20)}

    homes = with_session(one_after_another)
    held = replicas()
    assert all("lora-0" in held[home] for home in homes)


@pytest.mark.parametrize(
    "body, status, said",
    [
        ({"ids": [1], "deltas": {"lora-00": 1.0}}, 404, "did you mean 'lora-0'?"),
        ({"ids": [1], "deltas": {"lora-0": 1.0, "../lora-1": 1.0}}, 404, "no delta is named '../lora-1'"),
        ({"ids": [], "deltas": {}}, 422, "at least 1 item"),
        ({"ids": [1], "deltas": "lora-0"}, 422, "dict"),
        ({"ids": [1], "detlas": {}}, 422, "detlas"),
        ({"ids": [ray_tiny.VOCABULARY]}, 422, "not in the vocabulary"),
        ({"ids": [1] * 129}, 422, "more than the 128"),
        ({"ids": [1], "candidates": [ray_tiny.VOCABULARY]}, 422, "not in the vocabulary"),
        ({"ids": [1], "deltas": {"lora-0": 1e39}}, 422, "finite"),
        ({"ids": [1], "deltas": {f"lora-{n}": 1.0 for n in range(HELD)}}, 422, "at most 8 items"),
    ],
)
def test_bad_requests_are_refused_and_their_neighbours_are_not(
    served: Served, body: dict[str, Any], status: int, said: str
) -> None:
    good = Score(ids=[3, 4], deltas={"adapter-0": 1.0})

    async def together(session: aiohttp.ClientSession) -> tuple[int, str, list[dict[str, Any]]]:
        bad = session.post(f"{URL}/score", json=body)
        response, *answers = await asyncio.gather(bad, *(ask(session, URL, good) for _ in range(4)))
        return response.status, await response.text(), answers

    found, text, answers = with_session(together)
    assert (found, said in text) == (status, True), text
    for answer in answers:
        assert torch.allclose(torch.tensor(answer["scores"]), served.logits(good), atol=CLOSE)


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    rows = ray_tiny.requests(served.names, 600)

    async def burst() -> list[tuple[int, str | None, Any]]:
        async def one(session: aiohttp.ClientSession, row: Score) -> tuple[int, str | None, Any]:
            async with session.post(f"{URL}/score", json=row.model_dump()) as response:
                return response.status, response.headers.get("Retry-After"), await response.json()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(one(session, row) for row in rows))

    answers = asyncio.run(burst())
    full = [answer for answer in answers if answer[0] == 503]
    print(f"\n{len(full)} of {len(rows)} at once were turned away")
    assert full
    assert {after for _, after, _ in full} == {"1"}
    assert {status for status, _, _ in answers} == {200, 503}
    for row, (status, _, found) in zip(rows, answers, strict=True):
        if status == 200:
            assert torch.allclose(torch.tensor(found["scores"]), served.logits(row), atol=CLOSE)


def test_texts_are_streamed_each_under_its_own_delta(served: Served) -> None:
    singles = ("lora-0", "adapter-1", "bitfit-2", "prefix-3")
    kinds = ({}, *({name: 1.0} for name in singles), {"lora-1": 0.5, "bitfit-0": 0.5})
    rows = [Row(ids=[3 + n, 4, 5][: 1 + n % 3], deltas=deltas) for n, deltas in enumerate(kinds)]
    score = Score(ids=[8, 9], deltas={"lora-4": 1.0})
    heard: list[float] = []

    async def together(session: aiohttp.ClientSession) -> list[Any]:
        texts = (
            stream(session, URL, row, 6 + n, lambda count: heard.append(time.monotonic())) for n, row in enumerate(rows)
        )
        return await asyncio.gather(*texts, *(ask(session, URL, score) for _ in range(20)))

    found = with_session(together)
    expected = [served.text(row, 6 + n) for n, row in enumerate(rows)]
    assert found[: len(rows)] == expected
    assert len({tuple(text[:6]) for text in expected}) == len(rows)
    for answer in found[len(rows) :]:  # scores are right while texts are written
        assert torch.allclose(torch.tensor(answer["scores"]), served.logits(score), atol=CLOSE)
    assert len(set(heard)) > 5  # they came one by one


def test_a_stream_survives_its_replica(served: Served) -> None:
    row = Row(ids=[3, 4, 5], deltas={"lora-5": 1.0})
    names = [*replicas()]

    def during(count: int) -> None:
        if count == 5:
            for name in names:  # whichever it is on
                kill_replica(name)

    found = with_session(lambda session: stream(session, URL, row, 110, during))
    assert found == served.text(row, 110)


def test_what_generate_cannot_do_is_refused_before_the_stream(served: Served) -> None:
    async def one(session: aiohttp.ClientSession) -> tuple[int, str]:
        body = {"ids": [1], "deltas": {"nobody": 1.0}}
        async with session.post(f"{URL}/generate", json=body) as response:
            return response.status, await response.text()

    status, text = with_session(one)
    assert status == 404
    assert "no delta is named 'nobody'" in text


def test_functions_that_use_deltaspec_are_pickled_with_their_imports_at_the_top() -> None:
    # By value: as what `__main__` defines goes to Ray's workers.
    cloudpickle.register_pickle_by_value(ray_tiny)
    try:
        again = cloudpickle.loads(cloudpickle.dumps(ray_tiny.trained))
        assert again.__globals__ is not ray_tiny.trained.__globals__
        assert again.__globals__["deltaspec"] is deltaspec
        c = again(ray_tiny.backbone())
        there = cloudpickle.loads(cloudpickle.dumps(lambda ids: c(input_ids=ids, deltas=["lora-0"]).logits))
    finally:
        cloudpickle.unregister_pickle_by_value(ray_tiny)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(there(ids), c(input_ids=ids, deltas=["lora-0"]).logits)
