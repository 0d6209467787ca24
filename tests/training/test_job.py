"""Jobs: how many steps they have, which there are for a spec, and the table that is shown while they run."""

import io

import pytest
from jobs import compiled, job, mse
from rich.console import Console

import deltaspec
from deltaspec.training import Job, Training


def test_steps():
    assert Job("a", data=[1] * 5).total() == 5 and Job("a", data=[1] * 5, epochs=3, accumulate=2).total() == 8
    assert Job("a", data=iter([]), steps=7).total() == 7
    with pytest.raises(deltaspec.DeltaSpecError, match="DS382.*without a length"):
        Job("a", data=iter([])).total()


def test_jobs_of_a_spec():
    c = compiled()
    names = [*c.deltas]
    assert [one.deltas for one in Job.each(c, data=[])] == [(name,) for name in names]
    assert [one.name for one in Job.each(c, "lora", data=[], steps=3)] == names[:4]
    with pytest.raises(deltaspec.DeltaSpecError, match="DS434"):
        Job.each(c, "nope", data=[])
    with pytest.raises(ValueError, match="'lora' and 'ad' have different matrices"):
        Job.each(c, "lora", "ad", data=[])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"steps": 0}, "steps"), ({"accumulate": 0}, "accumulate"), ({"max_norm": 0.0}, "max_norm"),
     ({"keep_best": True}, "needs evaluation"), ({"epochs": 1.5}, "epochs")],
)  # fmt: skip
def test_wrong_options(options, error):
    with pytest.raises(ValueError, match=error):
        Job("a", data=[], **options)
    with pytest.raises(TypeError, match="names the deltas"):
        Job(data=[])


def test_a_file_gets_the_table_once_and_quiet_is_quiet(capsys):
    c, text = compiled(), io.StringIO()
    Training(c, [job(next(iter(c.deltas)), 1, steps=3, loss=mse)]).run(progress=Console(file=text, width=90))
    assert text.getvalue().count("lora[rank=1,lr_ratio=1]") == 1 and "3/3" in text.getvalue()
    Training(c, [job(next(iter(c.deltas)), 1, steps=2, loss=mse)]).run(progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
