"""`python -m deltaspec.demo`, the same as `deltaspec demo`."""

from __future__ import annotations

from deltaspec.cli.demo import command

command(prog_name="deltaspec demo")
