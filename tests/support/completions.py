"""A server on loopback that answers OpenAI's completions API from models of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[str, Tensor], Tensor]
"""From the name of a model and ids `[1, positions]` to logits."""


@contextmanager
def serving(logits: Logits, names: tuple[str, ...], written: Callable[[int], str] | None = None) -> Iterator[str]:
    """Serve models of these names, and yield the URL; `written` is what a token reads, where ids are not told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or asked["model"] not in names:
                self.answer(404, {"error": f"no model {asked['model']}"})
                return
            choices = [self.choice(n, asked["model"], prompt) for n, prompt in enumerate(asked["prompt"])]
            self.answer(200, {"choices": choices[::-1]})  # in whatever order: each has its index

        def choice(self, index: int, model: str, prompt: list[int]) -> dict[str, Any]:
            last = logits(model, torch.tensor([prompt]))[0, -1].double().log_softmax(-1)
            token = int(last.argmax())
            text = f"token_id:{token}" if written is None else written(token)
            return {"index": index, "text": "", "logprobs": {"tokens": [text], "token_logprobs": [float(last[token])]}}

        def answer(self, status: int, data: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
