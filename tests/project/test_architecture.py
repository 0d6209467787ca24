"""docs/architecture.md and its picture say what the code says."""

import draw_architecture
import pytest


def test_the_table_and_the_picture_are_current(capsys):
    assert draw_architecture.main(["--check"]) == 0, capsys.readouterr().out


def test_what_is_stale_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw_architecture, "ROOT", tmp_path)
    monkeypatch.setattr(draw_architecture, "TEXT", tmp_path / "docs.md")
    monkeypatch.setattr(draw_architecture, "table", lambda: "new\n")
    monkeypatch.setattr(draw_architecture, "picture", lambda: "<svg/>")
    monkeypatch.setattr(draw_architecture, "PICTURE", tmp_path / "docs.svg")
    draw_architecture.TEXT.write_text(f"before\n{draw_architecture.BEGIN}old\n{draw_architecture.END}after\n")
    assert draw_architecture.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is not what the code says: make generate writes it anew" for name in ("docs.md", "docs.svg")
    ]
    assert draw_architecture.main([]) == 0
    assert draw_architecture.main(["--check"]) == 0
    assert draw_architecture.TEXT.read_text().splitlines()[2] == "new"


def test_every_room_says_what_may_not_stand_in_it():
    rooms = [room for rooms in draw_architecture.layers() for room in rooms]
    without = [
        room
        for room in rooms
        if not any(text.split()[0] in draw_architecture.LIMITS for text in draw_architecture.docstring(room)[1:])
    ]
    assert without == []


def test_a_step_that_is_no_import_is_refused(monkeypatch):
    monkeypatch.setitem(draw_architecture.STEPS, "names.paths", ("compiler.build", "nothing"))
    with pytest.raises(ValueError, match=r"compiler\.build does not import names\.paths; mend STEPS"):
        draw_architecture.picture()


def test_a_step_up_is_refused(monkeypatch):
    monkeypatch.setattr(draw_architecture, "imported", lambda module: {"cli.tree"})
    monkeypatch.setattr(draw_architecture, "WITHIN", {})
    monkeypatch.setattr(draw_architecture, "STEPS", {"cli.tree": ("names.paths", "a tree")})
    with pytest.raises(ValueError, match=r"names\.paths stands below cli\.tree"):
        draw_architecture.picture()
