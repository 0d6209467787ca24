"""What a model says of where it was loaded from."""

from types import SimpleNamespace

from torch import nn

from deltaspec.backbone.origin import origin


def test_the_first_model_inside_that_was_loaded_says_from_where():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert origin(model) == {}
    model.config = SimpleNamespace(_name_or_path="")
    model[1].config = SimpleNamespace(_name_or_path="org/base", _commit_hash="8a3f")
    assert origin(model) == {"id": "org/base", "revision": "8a3f"}
    model.config._name_or_path = "/some/folder"
    assert origin(model) == {"id": "/some/folder"}
