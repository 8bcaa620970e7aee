"""The disk is full after any number of bytes: one line, code 5, and the same command goes on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from quantforge.files import cache_root
from quantforge.testing import save_tiny_checkpoint

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="compiles one"),
]
SETTINGS = {
    "calibration.sequences": 12,
    "calibration.sequence_length": 32,
    "search.bits": [2, 4],
    "search.group_sizes": [32],
    "search.refine": 1,
    "evaluate.curve_windows": 2,
    "evaluate.curve_bits": [4],
    "evaluate.tokens": 2,
    "quantize.rounding.steps": 2,
    "quantize.tuning.steps": 2,
    "quantize.tuning.batch": 1,
}
MOMENTS = 12

# Takes the place of what the C library writes regular files with, for Python and all libraries.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = LONG_MAX / 2, taken = 0;
void disk_set(long bytes) { left = bytes; taken = 0; }
long disk_taken(void) { return taken; }

/* How many of `count` bytes there is room for; -1 for none. */
static ssize_t room(int fd, size_t count) {
  struct stat about;
  if (fd <= 2 || fstat(fd, &about) || !S_ISREG(about.st_mode) || !count) return count;
  long before = __atomic_fetch_sub(&left, (long)count, __ATOMIC_SEQ_CST);
  long given = before >= (long)count ? (long)count : before > 0 ? before : 0;
  __atomic_fetch_add(&taken, given, __ATOMIC_SEQ_CST);
  if (!given) { errno = ENOSPC; return -1; }
  return given;
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *data, size_t count) {
  ssize_t given = room(fd, count);
  return given < 0 ? -1 : NEXT(write)(fd, data, given);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
  ssize_t given = room(fd, count);
  return given < 0 ? -1 : NEXT(pwrite64)(fd, data, given, at);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
  return pwrite64(fd, data, count, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  struct stat about;
  if (count < 1 || fstat(fd, &about) || !S_ISREG(about.st_mode))
    return NEXT(writev)(fd, parts, count);
  return write(fd, parts[0].iov_base, parts[0].iov_len);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t count) { errno = EINVAL; return -1; }
ssize_t sendfile(int out, int in, off_t *at, size_t count) { errno = EINVAL; return -1; }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
  errno = EINVAL;
  return -1;
}
int posix_fallocate64(int fd, off64_t at, off64_t count) {
  ssize_t given = room(fd, count);
  return given < (ssize_t)count ? ENOSPC : NEXT(posix_fallocate64)(fd, at, count);
}
int posix_fallocate(int fd, off_t at, off_t count) { return posix_fallocate64(fd, at, count); }
"""

# Loads the libraries once and forks for every command, after which the disk is full.
SERVER = """
import ctypes, json, os, sys
import torch, transformers, transformers.models.llama.modeling_llama
import quantforge.pipeline
from quantforge.cli import main

sys.dont_write_bytecode = True
shim = ctypes.CDLL(None)
shim.disk_set.argtypes, shim.disk_taken.restype = [ctypes.c_long], ctypes.c_long
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            sink = open(f"{order['said']}.{number}", "w")
            os.dup2(sink.fileno(), number)
        sys.argv[1:], code = order["words"], 0
        shim.disk_set(order["bytes"])
        try:
            main()
        except SystemExit as end:
            code = end.code
        taken = shim.disk_taken()
        shim.disk_set(1 << 60)
        with open(order["said"], "w") as told:
            json.dump([code, taken], told)
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@pytest.fixture
def command(tmp_path):
    """Runs a command on a disk with so many bytes; gives code, bytes written, lines on stderr."""
    source, library = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True
    )
    cache, said = tmp_path / "cache", tmp_path / "said"
    cache.mkdir()
    (cache / "native").symlink_to(cache_root() / "native", target_is_directory=True)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "LD_PRELOAD": str(library), "QUANTFORGE_CACHE": str(cache)},
    )  # fmt: skip
    with server:
        assert server.stdout.readline() == "ready\n"

        def run(*words, room=1 << 60):
            order = {"words": list(map(str, words)), "said": str(said), "bytes": room}
            print(json.dumps(order), file=server.stdin, flush=True)
            assert server.stdout.readline() == "done\n"
            lines = (tmp_path / "said.2").read_text().splitlines()
            return (*json.loads(said.read_text()), [x for x in lines if x and x[0] != "["])

        yield run
        server.stdin.close()


def contents(folder):
    """Name → digest of every file that is a result."""
    files = [path for path in folder.iterdir() if path.name != "run.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_full_disk_ends_in_one_line_and_the_command_goes_on(command, tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=2)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {n} of {7 * n % 11} and so on," for n in range(600)))
    settings = [x for k, v in SETTINGS.items() for x in ("--set", f"{k}={json.dumps(v)}")]

    def words(output, *more):
        return [
            "quantize", checkpoint, "--budget", "3bit", "--calibration", text, *settings, *more,
            "-o", output,
        ]  # fmt: skip

    work = tmp_path / "work"
    work.mkdir()
    code, total, _ = command(*words(work / "whole", "--fresh"))
    assert code == 0
    expected = contents(work / "whole")
    for moment in range(MOMENTS):
        room = int(total * (moment + 0.5) / MOMENTS)
        code, taken, lines = command(*words(work / "out", "--fresh", "--force"), room=room)
        shown = (moment, room, total, taken, lines)
        assert code in (0, 5), shown  # what is only a cache may be left out
        if code == 5:
            assert len(lines) == 1, shown
            assert lines[0].startswith("error: "), shown
            assert {path.name for path in work.iterdir()} <= {"whole", "out"}, shown
            code, _, lines = command(*words(work / "out", "--force"))
        print(room, lines)
        assert code == 0, shown
        assert contents(work / "out") == expected, shown
