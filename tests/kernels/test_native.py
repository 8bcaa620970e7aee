"""Which native library is loaded: one that was built from the text that is there now."""

import ctypes

from quantforge_kernels.native import build


def test_an_edited_header_is_a_new_library(tmp_path):
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    libraries = []
    for number in (41, 42):
        header.write_text(f"#define ANSWER {number}\n")
        libraries.append(build(source, tmp_path / "built"))
        assert ctypes.CDLL(str(libraries[-1])).answer() == number
    assert libraries[0] != libraries[1]
    assert build(source, tmp_path / "built") == libraries[1]
