"""AutoRound as a contestant, quantized in memory. See `task`.

"light" is its recipe of that name (50 iterations, learning rate 5e-3), "default" its plain one (200
iterations). Settings are further options of AutoRound, for example `enable_torch_compile`: by its
own choice it compiles a block before it trains, which costs the first of several rounds more than
the others. Its "fake" export can write the original weights, so the weights are taken from memory.
"""

from __future__ import annotations

import importlib.metadata

from task import Answer, keep_stdout, named_dtype, parse, read_tokens

METHODS = {"light": {"iters": 50, "lr": 5e-3}, "default": {}}


def main() -> None:
    """Quantize and answer."""
    task, reply, answer = parse(), keep_stdout(), Answer()
    import torch

    torch.set_num_threads(task.threads)
    import transformers
    from auto_round import AutoRound

    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.model, dtype=named_dtype(task.dtype)
    )
    tokens = read_tokens(task.tokens)
    runner = AutoRound(
        model,
        transformers.AutoTokenizer.from_pretrained(task.model),
        scheme={
            "bits": task.bits,
            "group_size": task.group_size,
            "sym": task.symmetric,
            "data_type": "int",
        },
        dataset=[row[None] for row in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=task.batch,
        device_map="cpu",
        **{**METHODS[task.method], **task.settings},
    )
    with answer.timed():
        quantized, layers = runner.quantize()
    answer.versions = {name: importlib.metadata.version(name) for name in ("auto-round", "torch")}
    names = [name for name, made in layers.items() if made["bits"] < 16]
    answer.send(reply, {n: quantized.get_submodule(n).weight for n in names}, task.output)


if __name__ == "__main__":
    main()
