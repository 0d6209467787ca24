"""What the readers of documents say of a text."""

import pytest

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_text


def findings(text: str, name: str = "t.yaml") -> list[str]:
    with pytest.raises(DeltaSpecError) as caught:
        from_text(text, name)
    return [f"{d.line}:{d.column} {d.code} {d.message}" for d in caught.value.diagnostics]


def hint(text: str, name: str = "t.yaml") -> str | None:
    with pytest.raises(DeltaSpecError) as caught:
        from_text(text, name)
    return caught.value.diagnostics[0].suggestion
