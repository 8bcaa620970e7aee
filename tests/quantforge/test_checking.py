"""Whether a server loads a finished folder: good and bad ones, and plans made for a server."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantforge
from quantforge.cli.options import Server
from quantforge.errors import InputError, UsageError
from quantforge.export.servers import SERVERS, fused_group, violations
from quantforge.load.huggingface import from_module
from quantforge.opening import configure, open_job
from quantforge.planning import loadable, require_loadable, require_split
from quantforge.search.config import SearchConfig
from quantforge.testing import write_quantized
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

BLOCK = "model.layers.0."
ATTENTION = [f"{BLOCK}self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
MLP = [f"{BLOCK}mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def network():
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def specs(default="4b-g32", **changed):
    """Layer name → spec; `changed` has the last parts of names."""
    found = {}
    for name in (*ATTENTION, *MLP):
        text = changed.get(name.rpartition(".")[2], default)
        found[name] = None if text == "kept" else QuantSpec.parse(text)
    return found


GOOD, BAD = "", None
# (specs, server, parts, what is in the way)
TABLE = [
    (specs(), "vllm", 1, GOOD),
    (specs("3b-pc"), "vllm", 2, GOOD),
    (specs(), "transformers", 1, GOOD),
    (specs("7b-g32"), "vllm", 1, GOOD),
    (specs("7b-g32"), "transformers", 1, "it loads 2, 3, 4, 5, 6, 8 bits, not 7"),
    (specs("4b-g32-asym"), "transformers", 1, "it loads no zero-points"),
    (specs("4b-g32-asym"), "vllm", 1, GOOD),
    (specs(q_proj="3b-g32"), "vllm", 1, "self_attn.q_proj+k_proj+v_proj: its members are fused"),
    (specs(up_proj="kept"), "vllm", 1, "mlp.gate_proj+up_proj: its members are fused"),
    (specs(q_proj="3b-g32"), "transformers", 1, GOOD),
    (specs(o_proj="3b-g32", down_proj="kept"), "vllm", 1, GOOD),
    (specs(down_proj="4b-g96"), "vllm", 1, "groups of 32, 64, 128 or whole rows, not of 96"),
    (specs(down_proj="4b-g64"), "vllm", 1, GOOD),
    (specs(down_proj="4b-g64"), "vllm", 2, "groups of 64 do not divide a slice of 96 inputs"),
    (specs(o_proj="4b-g64"), "vllm", 2, GOOD),
    (specs("4b-pc"), "vllm", 3, "4 attention heads do not split into 3"),
    (specs("4b-pc"), "vllm", 4, "48 outputs of a slice are no multiple of 32"),
    (specs("kept"), "vllm", 4, GOOD),
    (specs("3b-pc", q_proj="5b-g64", down_proj="4b-g96-asym"), "llama.cpp", 1, GOOD),
    (specs(down_proj="4b-g48"), "llama.cpp", 1, "down_proj: groups of 48 are no multiple of 32"),
    (specs("8b-g32-asym"), "llama.cpp", 1, "no type of GGUF holds 8b-g32-asym exactly"),
]


@pytest.mark.parametrize(("plan", "server", "parts", "problem"), TABLE)
def test_good_and_bad_folders(network, tmp_path, plan, server, parts, problem):
    write_quantized(tmp_path / "out", network, plan, stock_readable=False)
    report = quantforge.check(tmp_path / "out", server=server, tensor_parallel=parts)
    assert report.loads == (problem == GOOD), report.problems
    assert problem in "\n".join(report.problems)
    assert report.quantized == sum(spec is not None for spec in plan.values())
    assert report.quantized + report.kept == 9  # embedding and head


@pytest.mark.parametrize(("plan", "server", "parts", "problem"), TABLE)
def test_the_planner_has_the_same_rules(network, plan, server, parts, problem):
    layers = from_module(network).layers
    config = SearchConfig(server=server, tensor_parallel=parts)
    if problem == GOOD or "heads" in problem:  # heads are no matter of specs
        found = violations(SERVERS[server], layers, plan, parts)
        assert found == [] or "split into 3" in found[0]
        return
    with pytest.raises(UsageError, match=f"{server} would not load this plan") as caught:
        require_loadable(layers, plan, config)
    if "fused" not in problem:
        assert problem in str(caught.value)


def test_heads_that_do_not_split_are_refused_before_any_work(network):
    settings = {"search.server": "vllm", "search.tensor_parallel": 3}
    recipe = configure(network, settings=settings)
    with pytest.raises(UsageError, match=r"on 3 devices: 4 attention heads do not split into 3"):
        open_job(network, recipe, calibration=[[1, 2, 3]])
    described = {"num_attention_heads": 8, "num_key_value_heads": 3}
    require_split(described, SearchConfig(server="vllm"))
    require_split(described, SearchConfig(tensor_parallel=1))
    with pytest.raises(UsageError, match="3 heads of keys and values do not split into 2"):
        require_split(described, SearchConfig(server="vllm", tensor_parallel=2))
    gemma = {"architectures": ["Gemma3ForCausalLM"]}
    require_split(gemma, SearchConfig(server="vllm"))
    with pytest.raises(UsageError, match="any plan: Gemma3ForCausalLM is not written as GGUF"):
        require_split(gemma, SearchConfig(server="llama.cpp"))


def test_an_embedding_of_three_bits_and_experts_that_differ(network, tmp_path):
    plan = {**specs(), "model.embed_tokens": QuantSpec(3, 32)}
    write_quantized(tmp_path / "out", network, plan, stock_readable=False)
    report = quantforge.check(tmp_path / "out")
    assert report.problems == ("model.embed_tokens: it loads embeddings of 2, 4, 8 bits, not 3",)
    names = [f"model.layers.1.mlp.experts.{index}.up_proj" for index in range(2)]
    assert {fused_group(name) for name in names} == {"model.layers.1.mlp.experts"}
    experts = [
        LayerInfo(
            name=name, out_features=64, in_features=64, block=1, stage=0,
            fused_group=fused_group(name),
        )
        for name in names
    ]  # fmt: skip
    mixed = dict(zip(names, (QuantSpec(3), QuantSpec(4)), strict=True))
    assert len(violations(SERVERS["vllm"], experts, mixed)) == 1
    assert violations(SERVERS["vllm"], experts, dict.fromkeys(names, QuantSpec(3))) == []


def test_candidates_that_a_server_does_not_load_leave_the_search(network):
    layers = from_module(network).layers
    candidates = tuple(
        sorted(map(QuantSpec.parse, ("3b-g64", "3b-pc", "7b-pc", "4b-g96", "3b-g128")))
    )
    losses = torch.ones(len(layers), len(candidates), dtype=torch.float64)
    known = Sensitivity(
        layers=layers, specs=candidates, loss=losses, error=losses, estimator="", fingerprint=""
    )

    def left(**config):
        found = loadable(known, SearchConfig(**config)).loss.isfinite()
        return {
            layer.name.rpartition(".")[2]: {str(candidates[i]) for i in row.nonzero().flatten()}
            for layer, row in zip(layers, found, strict=True)
        }

    assert loadable(known, SearchConfig()) is known
    assert left(server="transformers")["up_proj"] == {"3b-g64", "3b-pc"}  # rows of 128
    assert left(server="transformers")["down_proj"] == {"3b-g64", "3b-pc", "4b-g96"}
    assert left(server="vllm")["down_proj"] == {"3b-g64", "3b-pc", "7b-pc"}
    # 3b-g64 takes no more of a GGUF than 3b-pc, Q4_0's 4.5 bits for rows of 128 or 192
    assert left(server="llama.cpp")["o_proj"] == {"3b-g64", "7b-pc"}
    assert left(server="llama.cpp")["down_proj"] == {"3b-g64", "4b-g96", "7b-pc"}
    split = left(server="vllm", tensor_parallel=2)
    assert split["down_proj"] == {"3b-pc", "7b-pc"}  # slices of 96
    assert split["o_proj"] == {"3b-g64", "3b-pc", "7b-pc"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 2}, "search.server=vllm"),
        ({"server": "vllm", "independent": True}, "independent"),
    ],
)
def test_a_server_that_cannot_be_planned_for_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)


def test_wrong_questions_are_errors(network, tmp_path):
    assert {one.value for one in Server} == set(SERVERS)
    write_quantized(tmp_path / "out", network, specs())
    with pytest.raises(UsageError, match="known: transformers, vllm"):
        quantforge.check(tmp_path / "out", server="vlm")
    with pytest.raises(UsageError, match="--tp"):
        quantforge.check(tmp_path / "out", server="transformers", tensor_parallel=2)
    with pytest.raises(InputError, match="is not a folder"):
        quantforge.check(tmp_path / "nothing")
