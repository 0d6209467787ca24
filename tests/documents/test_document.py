"""Reading a document: files, the place of every value, and any text whatever."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole import examples

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_text, read


def test_a_byte_order_mark_is_tolerated(tmp_path):
    for name, text in (("a.yaml", "a: 1"), ("a.json", '{"a": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(tmp_path / name).data == {"a": 1}


def test_windows_line_ends_and_surrogate_pairs():
    assert from_text("a: 1\r\nb: 2\r\n").data == {"a": 1, "b": 2}
    assert from_text('{"a": "\\ud83d\\ude00"}', "t.json").data == {"a": "😀"}


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.yaml", 'a: 1\nb:\n  - x\n  - {k: "😀", v: 3}\n'),
        ("t.json", '{"a": 1,\n"b": [\n  "x",\n  {"k": "😀", "v": 3}]}'),
    ],
)
def test_places_of_keys_and_values(name, text):
    document = from_text(text, name)
    lines = text.splitlines()

    def at(path, key=False):
        line, column = document.position(path, key)
        return lines[line - 1][column - 1 :]

    assert at(("b", 0)).startswith(("x", '"x"'))
    assert at(("b", 1, "v")).startswith("3")
    assert at(("b", 1, "v"), key=True).startswith(("v: 3", '"v": 3'))
    assert at(("b", 1, "nowhere", 7)) == at(("b", 1)), "the nearest container stands in"
    assert document.position((), key=True) == (1, 1)


def test_files_that_cannot_be_read(tmp_path):
    latin, utf16, big = tmp_path / "l.yaml", tmp_path / "u.yaml", tmp_path / "b.yaml"
    latin.write_bytes("a: 1\nb: caf\xe9".encode("latin-1"))
    utf16.write_bytes("a: 1".encode("utf-16"))
    big.write_bytes(b"a: x" * (10 << 18))
    expected = {
        tmp_path: ("DS101", 0, 0, "this is a directory"),
        tmp_path / "none.yaml": ("DS101", 0, 0, "No such file"),
        latin: ("DS103", 2, 7, "byte 0xe9"),
        utf16: ("DS103", 1, 1, "byte 0xff"),
        big: ("DS102", 0, 0, "larger than 1 MiB"),
        "a\x00b": ("DS101", 0, 0, "null byte"),
        "deltaspec: 1\ndeltas: []": ("DS101", 0, 0, "No such file"),
    }
    for path, (code, line, column, text) in expected.items():
        with pytest.raises(DeltaSpecError) as caught:
            read(path)
        (finding,) = caught.value.diagnostics
        assert (finding.code, finding.line, finding.column) == (code, line, column)
        assert text in finding.message
        assert "\n" not in finding.file


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["manifest.json", "a.deltaspec.yaml"], "name its spec, {0}/a.deltaspec.yaml; deltaspec.restore"),
        (["manifest.json", "a.1f.deltaspec.json"], 'deltaspec.restore(model, "{0}")'),
        (["adapter_config.json"], "this is an adapter: deltaspec convert {0} -o OUT"),
        (["config.json", "model.safetensors"], "this is a model's folder: the model comes first, then specs"),
        (["b.deltaspec.yaml"], "name a file in it, such as {0}/b.deltaspec.yaml"),
        ([], "name a file: task.deltaspec.yaml"),
    ],
)
def test_a_directory_in_place_of_a_spec_is_told_by_what_it_holds(tmp_path, files, hint):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DeltaSpecError, match="this is a directory") as caught:
        read(tmp_path)
    assert caught.value.diagnostics[0].suggestion.startswith(hint.format(tmp_path))


def test_devices_and_pipes_are_not_waited_for():
    with pytest.raises(DeltaSpecError, match="not a regular file"):
        read("/dev/zero")


def test_ten_megabytes_are_not_even_parsed(tmp_path):
    path = tmp_path / "big.deltaspec.yaml"
    path.write_bytes(b"[" * (10 << 20))
    done = subprocess.run(
        [sys.executable, "-m", "deltaspec", "validate", str(path)], capture_output=True, text=True, timeout=5
    )
    assert done.returncode == 1
    assert "error[DS102] larger than 1 MiB" in done.stdout


@given(st.text(max_size=60), st.sampled_from(["t.yaml", "t.json"]))
@examples(400)
def test_any_text_gives_data_or_findings(text, name):
    try:
        assert isinstance(from_text(text, name).data, dict)
    except DeltaSpecError as error:
        assert error.diagnostics
        assert all(d.file == name and d.code.startswith("DS1") for d in error.diagnostics)
