"""`deltaspec explain`, by what it prints."""

from __future__ import annotations

from command_line import Run, change


def test_explain_says_which_condition_refused(run: Run) -> None:
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.query")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("bert.encoder.layer.0.attention.self.query: Linear, 16 → 16, roles attn.q")
    assert "french (lora): not selected" in lines
    assert any("✓ role [attn.q, attn.v]: accepted" in line and "french.deltaspec.yaml:7:" in line for line in lines)
    assert any("✗ layers" in line and "refused" in line for line in lines)
    assert "head (full): not selected" in lines


def test_explain_says_what_is_put_there(run: Run) -> None:
    taken = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.1.attention.self.query").output
    assert "french (lora): taken with rank=2 alpha=16 dropout=0: down [2, 16], up [16, 2]" in taken
    change("target: classifier", "target: bert.encoder.layer.0.attention")
    below = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.query").output
    assert "head (full): taken: weight [16, 16], bias [16]" in below
    assert "part of bert.encoder.layer.0.attention" in below


def test_explain_says_what_the_method_refused(run: Run) -> None:
    change("{role: [attn.q, attn.v], layers: {from: 1}}", "'**.attention'")
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.1.attention")
    assert result.exit_code == 0 and "selected, but lora needs a Linear" in result.output and "DS402" in result.output


def test_explain_of_default_roles_and_of_a_parameter(run: Run) -> None:
    change("    target: {role: [attn.q, attn.v], layers: {from: 1}}\n    expect: {sites: 4}\n", "")
    name = "bert.encoder.layer.0.attention.self.{}.weight"
    assert (
        "default roles of lora" in run("explain", "config.json", "french.deltaspec.yaml", name.format("query")).output
    )
    refused = run("explain", "config.json", "french.deltaspec.yaml", name.format("key")).output
    assert "french (lora): not selected" in refused and "its roles are attn.k" in refused


def test_explain_of_an_unknown_name(run: Run) -> None:
    result = run("explain", "config.json", "french.deltaspec.yaml", "bert.encoder.layer.0.attention.self.qeury")
    assert result.exit_code == 1 and "did you mean 'bert.encoder.layer.0.attention.self.query'?" in result.output
