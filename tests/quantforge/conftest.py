"""Every test of the package works in a cache of its own session, not in the user's."""

from collections.abc import Iterator

import pytest

from quantforge.files import CACHE_VARIABLE, cache_root

# Downloads, what is made of them, and built kernels: the same for everyone, and minutes to get.
SHARED = ("packages", "converted", "native")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root, folder = cache_root(), tmp_path_factory.mktemp("cache")
    for name in SHARED:
        (root / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(root / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield
