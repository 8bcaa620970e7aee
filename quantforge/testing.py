"""Tiny networks and data for tests and scripts; the library itself never imports this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.types import PER_TENSOR, BitPlan, QuantizedWeight, QuantSpec


def tiny_llama(
    *,
    seed: int = 0,
    hidden: int = 64,
    intermediate: int = 128,
    blocks: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 96,
    tied: bool = True,
) -> Any:
    """A randomly initialised float32 LlamaForCausalLM in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).train(False)


def markov_tokens(sequences: int, length: int, *, vocabulary: int = 96, seed: int = 0) -> Tensor:
    """[sequences, length] int64 tokens of a sparse first-order Markov chain: learnable text."""
    table = torch.Generator().manual_seed(1234)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=table)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(sequences, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocabulary, (sequences,), generator=generator)
    for step in range(1, length):
        choice = torch.multinomial(
            torch.tensor([0.55, 0.25, 0.15, 0.05]).expand(sequences, 4), 1, generator=generator
        )
        tokens[:, step] = successors[tokens[:, step - 1]].gather(1, choice).squeeze(1)
    return tokens


def train(module: nn.Module, *, steps: int = 150, seed: int = 0, vocabulary: int = 96) -> nn.Module:
    """Train a tiny causal model on `markov_tokens` so that its layers matter; returns it."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(steps):
        batch = markov_tokens(16, 48, vocabulary=vocabulary, seed=seed * 100_003 + step)
        loss = module(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def save_tiny_checkpoint(
    folder: Path, *, shards: int = 1, seed: int = 0, steps: int = 150, **shape: Any
) -> Path:
    """Write a tiny Llama, trained for `steps`, with a byte-level tokenizer as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    module: Any = tiny_llama(seed=seed, vocabulary=256, **shape)
    if steps:
        train(module, steps=steps, vocabulary=256, seed=seed)
    size = sum(p.numel() * 4 for p in module.parameters())
    module.save_pretrained(folder, max_shard_size=size // shards + 4096)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, *, seed: int = 0, positions: int = 64) -> Path:
    """Write a random BERT encoder whose layers matter, with a byte-level tokenizer, as a folder.

    The tokenizer puts [CLS] and [SEP] around every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    alphabet = ["[PAD]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    config = BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(alphabet),
        max_position_embeddings=positions,
    )
    torch.manual_seed(seed)
    module: Any = BertModel(config).train(False)
    sharpen(module)
    module.save_pretrained(folder)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def sharpen(encoder: nn.Module, factor: float = 4.0) -> None:
    """Multiply the matrices of an encoder's blocks: at their first values blocks hardly matter."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2 and ".layer." in name:
            parameter.mul_(factor)


def random_weight(
    out_features: int, in_features: int, spec: QuantSpec, *, seed: int = 0
) -> QuantizedWeight:
    """A weight of random codes, with scales of both signs that give values of about ±0.1."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = spec.groups(in_features), spec.top + 1
    codes = torch.randint(top, (out_features, in_features), generator=generator)
    magnitude = 0.05 + 0.1 * torch.rand(out_features, groups, generator=generator)
    sign = torch.randint(2, (out_features, groups), generator=generator) * 2 - 1
    zero = torch.randint(top, (out_features, groups), generator=generator).to(torch.uint8)
    if spec.group_size == PER_TENSOR:
        magnitude, sign = (x[:1].expand_as(x) for x in (magnitude, sign))
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scale=(2 * magnitude * sign / top).to(torch.bfloat16),
        zero=None if spec.symmetric else zero,
        spec=spec,
    )


def plan_of(assignment: Mapping[str, QuantSpec | None]) -> BitPlan:
    """A plan with this assignment; its averages are placeholders."""
    return BitPlan(
        assignment=assignment,
        budget="3bit",
        stored_bits=3.0,
        code_bits=2.5,
        predicted_loss=0.125,
        solver="file",
    )


def write_quantized(
    folder: Path,
    module: Any,
    assignment: Mapping[str, QuantSpec | None],
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, QuantizedWeight]:
    """Write a checkpoint of `module` whose planned layers hold random weights; returns those.

    Args:
        folder: where.
        module: a transformers model; gives the shapes and everything kept.
        assignment: layer name → spec, None to keep it.
        seed: of the random weights.
        options: for `CheckpointWriter`.
    """
    from quantforge.export.writer import CheckpointWriter

    quantized: dict[str, QuantizedWeight] = {}
    options.setdefault("ignore", ["lm_head"])
    options.setdefault("generation_config", module.generation_config.to_dict())
    config, plan = module.config.to_dict(), plan_of(assignment)
    config["architectures"] = [type(module).__name__]
    with CheckpointWriter(folder, model_config=config, plan=plan, **options) as writer:
        for index, (name, tensor) in enumerate(module.state_dict().items()):
            layer = name.removesuffix(".weight")
            spec = assignment.get(layer) if layer != name else None
            if spec is None:
                writer.add_tensor(name, tensor)
                continue
            rows, columns = tensor.shape
            quantized[layer] = random_weight(rows, columns, spec, seed=seed + index)
            embedding = isinstance(module.get_submodule(layer), nn.Embedding)
            kind: Any = "embedding" if embedding else "linear"
            writer.add_layer(layer, quantized[layer], kind=kind)
        writer.finish()
    return quantized


@torch.no_grad()
def offgrid(module: nn.Module, *, low: float = 0.8, high: float = 1.25, seed: int = 0) -> None:
    """Rescale the channels of a Llama in place without changing what it computes.

    A checkpoint that was dequantized from integers lies exactly on a grid, which flatters grids
    like it. Every random scale here is folded into a neighbour (norms, up into down, v into o), so
    the function stays and the grid is gone.

    Args:
        module: a Llama-type causal model.
        low: smallest scale.
        high: largest scale.
        seed: of the scales, which are log-uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = module.config
    size = config.hidden_size // config.num_attention_heads
    repeats = config.num_attention_heads // config.num_key_value_heads

    def scales(count: int) -> Tensor:
        share = torch.rand(count, generator=generator)
        return low * (high / low) ** share

    for block in module.get_submodule("model.layers").children():
        part: Any = block
        attention, mlp = part.self_attn, part.mlp
        readers = (
            (part.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (part.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, projections in readers:
            scale = scales(norm.weight.numel())
            norm.weight /= scale
            for projection in projections:
                projection.weight *= scale
        scale = scales(len(mlp.up_proj.weight))
        mlp.up_proj.weight /= scale[:, None]
        mlp.down_proj.weight *= scale
        scale = scales(len(attention.v_proj.weight))
        attention.v_proj.weight /= scale[:, None]
        heads = scale.view(-1, 1, size).expand(-1, repeats, size)
        attention.o_proj.weight *= heads.reshape(1, -1)


def tiny_convolutional(*, seed: int = 0, clipped: bool = False) -> Any:
    """A random float32 `VisionNetwork` of seven layers: a stem, two blocks and a classifier.

    It reads [batch, 3, 16, 16]; the second block has a depthwise layer, a residual sum and its
    channels in two groups, the first a stride.

    Args:
        seed: of the weights.
        clipped: activation functions end at 6 instead of going on.
    """
    from torch import fx

    from quantforge.types import LayerInfo
    from quantforge.vision.network import Block, Preprocessing, Site, VisionNetwork

    aten = torch.ops.aten

    def active(x: Tensor) -> Tensor:
        made: Tensor = aten.hardtanh.default(x, 0.0, 6.0) if clipped else aten.relu.default(x)
        return made

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.down = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2)
            self.widen = nn.Conv2d(8, 16, 1)
            self.spatial = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.narrow = nn.Conv2d(16, 8, 1)
            self.head = nn.Conv2d(8, 24, 1)
            self.classifier = nn.Linear(24, 10)

        def forward(self, pictures: Tensor) -> Tensor:
            x = active(self.stem(pictures))
            x = active(self.down(x))
            x = aten.add.Tensor(self.narrow(active(self.spatial(active(self.widen(x))))), x)
            pooled = aten.mean.dim(active(self.head(x)), [2, 3])
            made: Tensor = self.classifier(pooled)
            return made

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net().eval().requires_grad_(False)
        for module in net.children():
            for parameter in module.parameters():  # so that the logits are of a size that matters
                parameter.mul_(2.0)
    graph = fx.symbolic_trace(net)
    layers: list[LayerInfo] = []
    reads: dict[str, str] = {}
    places = {"stem": 0, "down": 0, "widen": 1, "spatial": 1, "narrow": 1, "head": 2}
    after: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        weight: Any = graph.get_submodule(node.target).weight
        layers.append(
            LayerInfo(
                name=node.target,
                kind="linear" if weight.ndim == 2 else "convolution",
                out_features=len(weight),
                in_features=weight[0].numel(),
                block=places.get(node.target, 2),
                stage=len(layers),
                fused_group=node.target,
            )
        )
        reads[node.target] = node.args[0].name
        after[node.target] = next(iter(node.users)).name
    total, pooled = after["narrow"], reads["classifier"]
    sites = [Site(node=name, grid=name) for name in ("pictures", after["stem"])]
    sites += [Site(node=after["down"], grid="sum")]
    sites += [Site(node=after[name], grid=after[name]) for name in ("widen", "spatial")]
    sites += [Site(node="narrow", grid="sum"), Site(node=total, grid="sum")]
    sites += [Site(node=name, grid=name) for name in (after["head"], pooled)]
    ends = [("first", "pictures", after["down"]), ("second", after["down"], total),
            ("last", total, "classifier")]  # fmt: skip
    blocks = tuple(
        Block(
            name=name, source=source, result=result,
            layers=tuple(layer.name for layer in layers if layer.block == index),
        )
        for index, (name, source, result) in enumerate(ends)
    )  # fmt: skip
    return VisionNetwork(
        graph=graph, name="tiny", layers=tuple(layers), reads=reads, sites=tuple(sites),
        blocks=blocks, channels=3, fingerprint="0" * 64,
        preprocessing=Preprocessing(size=(16, 16), mean=(0.5,) * 3, deviation=(0.5,) * 3),
    )  # fmt: skip
