"""The Python of docs/training.md, run as printed on a tiny model."""

import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from repository import ROOT
from tiny_models import BASIC
from torch import distributed
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import deltaspec
from deltaspec.training import Job

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.S | re.M)


def rows(number):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 48, (number, 5), generator=generator)
    return [{"input_ids": each, "labels": int(each[0] > 20)} for each in ids]


def collate(features):
    labels = torch.tensor([each["labels"] for each in features])
    return {"input_ids": torch.stack([each["input_ids"] for each in features]), "labels": labels}


def accuracy(outputs, batch):
    return {"accuracy": float((outputs.logits.argmax(-1) == batch["labels"]).float().mean())}


@contextmanager
def processes(folder):
    """Be one of several processes, the only one."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_it_runs(number, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BASIC, max_position_embeddings=32))
    spec = ROOT / "specs/sweep.deltaspec.yaml"
    c = deltaspec.compile(model, spec)
    monkeypatch.chdir(tmp_path)
    given = {
        "c": c, "model": model, "torch": torch, "deltaspec": deltaspec, "F": F, "accuracy": accuracy,
        "loader": torch.utils.data.DataLoader(rows(8), 4, collate_fn=collate), "held_out": [collate(rows(4))],
        "rows": [{**row, "job": name} for row in rows(2) for name in c.deltas],
        "args": TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True),
    }  # fmt: skip
    text = BLOCKS[number].replace('"specs/sweep.deltaspec.yaml"', repr(str(spec))).replace('("french")', "(*c.deltas)")
    text = text.replace('c.parameter_groups("french")', "c.parameter_groups()")
    given["jobs"] = [Job(name, data=given["loader"]) for name in c.deltas]
    with processes(tmp_path) if "DistributedDataParallel" in text else nullcontext():
        exec(text, given)
    if "results" in given:
        assert (tmp_path / "curves.svg").exists() and len(given["results"]) == 6
