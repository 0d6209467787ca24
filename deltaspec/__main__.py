"""Run the command line with `python -m deltaspec`.

Makes that one call.
"""

from __future__ import annotations

from deltaspec.cli import main

if __name__ == "__main__":
    main(prog_name="deltaspec")
