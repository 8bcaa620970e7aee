"""What the tests of the native kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from quantforge_kernels import native

Sanitized = Callable[[str, native.Options, str], None]


@pytest.fixture
def sanitized(tmp_path: Path) -> Sanitized:
    """Runs a script on a kernel that is compiled with the sanitizers of addresses and behaviour.

    The function takes the kernel's source file, its options, and a script in which `library` is
    the path of what was built and from which the tests beside this file can be imported. It fails
    where a sanitizer or the script does.
    """
    compiler = native.find_compiler().path
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizer is used with gcc or clang on Linux")
    answer = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    runtime = Path(answer.stdout.strip())
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip("the compiler has no address sanitizer runtime")

    def run(source: str, options: native.Options, script: str) -> None:
        checked = replace(options, extra=("-O1", "-g", "-fsanitize=address,undefined"))
        library = native.build(native.SOURCES / source, tmp_path, checked)
        lines = (
            "import sys",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            f"library = {str(library)!r}",
            script,
            "print('clean')",
        )
        environment = {
            **os.environ,
            "LD_PRELOAD": str(runtime),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "2",
        }
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "runtime error" not in done.stderr, done.stderr[-2000:]
        assert done.stdout.strip() == "clean"

    return run
