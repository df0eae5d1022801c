"""Being here puts this folder on the import path, so that every test can `from tiny import ...`."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests leave the user's cache alone, and need none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLYMIX_CACHE", str(tmp_path_factory.mktemp("cache") / "plymix"))
        yield
