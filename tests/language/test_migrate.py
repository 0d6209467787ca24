"""Documents of older versions, of which there are none yet."""

from deltaspec.language.migrate import CURRENT, migrate


def test_migrating_the_current_version_changes_nothing():
    data = {"deltaspec": CURRENT, "deltas": []}
    assert migrate(data) == data
