"""`deltaspec lock`, and `deltaspec plan --check` after it."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Run, change


def test_lock_then_check(run: Run) -> None:
    lock = Path("french.deltaspec.lock.json")
    missing = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert missing.exit_code == 1 and "DS510" in missing.output
    assert run("lock", "config.json", "french.deltaspec.yaml").exit_code == 0 and lock.exists()
    clean = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert clean.exit_code == 0 and "french.deltaspec.lock.json: up to date" in clean.output
    change("from: 1}}\n    expect: {sites: 4}", "from: 2}}")
    drifted = run("plan", "config.json", "french.deltaspec.yaml", "--check")
    assert drifted.exit_code == 1
    assert (
        "DS515" in drifted.output
        and "2 sites gone: bert.encoder.layer.1.attention.self.{query,value}" in drifted.output
    )
    github = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "github")
    assert github.exit_code == 1 and github.output.startswith("::error file=french.deltaspec.yaml,line=4")
    markdown = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "markdown")
    assert markdown.exit_code == 1 and "DS515" in markdown.output


def test_check_in_machine_formats_is_clean_output(run: Run) -> None:
    run("lock", "config.json", "french.deltaspec.yaml")
    result = run("plan", "config.json", "french.deltaspec.yaml", "--check", "--format", "json")
    assert result.exit_code == 0 and json.loads(result.output)["findings"] == []


def test_several_specs_have_a_lock_each(run: Run) -> None:
    Path("more.deltaspec.json").write_text(
        json.dumps({"deltaspec": 1, "deltas": [{"name": "more", "method": "bitfit", "target": {"role": "attn.k"}}]})
    )
    both = ("french.deltaspec.yaml", "more.deltaspec.json")
    assert run("lock", "config.json", *both).exit_code == 0
    assert run("plan", "config.json", *both, "--check").exit_code == 0
    for spec in both:  # what is locked of a spec does not depend on its company
        assert run("plan", "config.json", spec, "--check").exit_code == 0


def test_a_plan_with_findings_is_not_locked(run: Run) -> None:
    change("sites: 4", "sites: 5")
    assert run("lock", "config.json", "french.deltaspec.yaml").exit_code == 1
    assert not Path("french.deltaspec.lock.json").exists()


def test_specs_that_would_share_a_lock_are_refused(run: Run) -> None:
    Path("french.deltaspec.json").write_text('{"deltaspec": 1, "deltas": [{"name": "x", "method": "lora"}]}')
    result = run("lock", "config.json", "french.deltaspec.yaml", "french.deltaspec.json")
    assert result.exit_code == 2 and not list(Path().glob("*.lock.json"))
