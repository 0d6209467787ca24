"""Adapters and base models on a hub: a fake one on loopback refuses in each way that the real one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import torch

import deltaspec
from deltaspec.backbone.loading import model_from
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

SHA = "a" * 40
REFUSALS: dict[str, tuple[int, str]] = {
    "ann/private": (401, "RepoNotFound"), "ann/gated": (403, "GatedRepo"), "ann/none": (404, "RepoNotFound"),
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        repo, kind = "/".join(parts[:2]), parts[2:3]
        if repo in REFUSALS:
            return self.answer(b"{}", *REFUSALS[repo])
        files = sorted(path for path in (self.root / repo).rglob("*") if path.is_file())
        if not files:
            return self.answer(b"{}", 404, "RepoNotFound")
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", "v1.0", SHA):
            return self.answer(b"{}", 404, "RevisionNotFound")
        named = [str(file.relative_to(self.root / repo)) for file in files]
        if kind == ["tree"]:
            listed = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40}
                for n, f in zip(named, files, strict=True)
            ]
            return self.answer(json.dumps(listed).encode())
        if kind == ["resolve"]:
            file = self.root / repo / "/".join(parts[4:])
            return self.answer(file.read_bytes()) if file.is_file() else self.answer(b"", 404, "EntryNotFound")
        return self.answer(json.dumps({"id": repo, "sha": SHA, "siblings": [{"rfilename": n} for n in named]}).encode())

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)), "ETag": f'"{len(body)}"', "X-Repo-Commit": SHA, "X-Error-Code": code,
            "Content-Type": "application/json",
        }.items():  # fmt: skip
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    class Own(Handler):
        root = tmp_path / "hub"

    Own.root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield Own.root
    server.shutdown()
    server.server_close()


def refused(reference: str) -> Diagnostic:
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.restore(peft_adapters.base(), reference)
    (finding,) = caught.value.diagnostics
    assert finding.code == "DS521"
    return finding


@torch.no_grad()
def test_a_folder_at_a_revision_is_read_as_it_is_here(hub: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    here = peft_adapters.write(hub / "ann/many/nl/formal")
    expected = deltaspec.restore(peft_adapters.base(), here)(input_ids=ids).logits
    for reference in ("ann/many/nl/formal", "ann/many/nl/formal@v1.0", f"ann/many/nl/formal@{SHA}"):
        assert torch.equal(deltaspec.restore(peft_adapters.base(), reference)(input_ids=ids).logits, expected)


def test_each_refusal_of_the_hub_is_said_with_its_own_way_out(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft_adapters.write(hub / "ann/many/nl")
    (hub / "ann/bare").mkdir()
    (hub / "ann/bare/README.md").write_text("nothing yet")
    for reference, message, hint in (
        ("ann/private", "the hub has no such repository, or shows it to its owner alone", "hf auth login"),
        ("ann/none", "the hub has no such repository, or shows it to its owner alone", "check the id"),
        ("ann/gated", "the hub gives it only to those whom its owner lets in", "ask for access at http://127.0.0.1"),
        ("ann/many/nl@v9", "the hub's repository has no revision 'v9'", "a branch, a tag or a commit"),
        ("ann/many/de", "there is no adapter in the folder 'de' of this repository", "org/name/folder"),
        ("ann/bare", "there is no adapter in this repository", "may lie in a folder"),
    ):
        finding = refused(reference)
        assert message in finding.message and hint in str(finding.suggestion), finding
        assert str(hub.parent) not in finding.file
    assert capsys.readouterr().err == ""


def test_without_a_network_the_cache_is_read_and_else_it_is_said_what_to_do(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    peft_adapters.write(hub / "ann/french")
    deltaspec.restore(peft_adapters.base(), "ann/french")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    deltaspec.restore(peft_adapters.base(), "ann/french")
    finding = refused("ann/german")
    assert "the hub (http://127.0.0.1:9) cannot be reached: " in finding.message
    assert "hf download ann/german" in str(finding.suggestion) and "HTTPS_PROXY" in str(finding.suggestion)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = refused("ann/german")
    assert "it is not in the hub's cache, and HF_HUB_OFFLINE is set" in finding.message
    assert "unset HF_HUB_OFFLINE" in str(finding.suggestion)


def test_a_base_model_on_the_hub_is_refused_in_the_same_words(hub: Path) -> None:
    for reference, message in (
        ("ann/gated", "the hub gives it only to those whom its owner lets in"),
        ("ann/none", "the hub has no such repository"),
    ):
        with pytest.raises(DeltaSpecError) as caught:
            model_from(reference)
        (finding,) = caught.value.diagnostics
        assert finding.code == "DS321" and message in finding.message
