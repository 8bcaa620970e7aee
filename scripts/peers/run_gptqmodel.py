"""GPTQModel as a contestant: "gptq", "gptaq" or "foem", quantized in memory. See `task`.

Settings are further options of its QuantizeConfig, after its own defaults (act-order inside groups,
damping 0.05 and so on). Left to itself ("auto") it loads a model in bfloat16 on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from task import Answer, Task, keep_stdout, named_dtype, parse, read_tokens

WORKERS = "GPTQMODEL_CPU_WORKERS"


def main() -> None:
    """Quantize and answer."""
    task, reply, answer = parse(), keep_stdout(), Answer()
    if (os.cpu_count() or 1) < 3 and WORKERS not in os.environ:
        # Half the cores is its own choice, and a loader that wants two workers then stops it.
        os.environ[WORKERS] = "2"
        answer.notes.append(f"{WORKERS}=2: it does not start on fewer than 3 cores otherwise")
    import torch

    torch.set_num_threads(task.threads)
    from gptqmodel import GPTQModel

    model = GPTQModel.load(
        task.model, configuration(task), device="cpu", dtype=named_dtype(task.dtype)
    )
    tokens = read_tokens(task.tokens)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    with answer.timed():
        model.quantize(rows, batch_size=task.batch)
    answer.versions = {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch")}
    answer.send(reply, weights(model.model), task.output)


def configuration(task: Task) -> Any:
    """What it is to do; FOEM and GPTAQ with its own defaults."""
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig, QuantizeConfig

    methods: dict[str, dict[str, Any]] = {
        "gptq": {},
        "gptaq": {"gptaq": GPTAQConfig()},
        "foem": {"foem": FOEMConfig()},
    }
    options = {
        "bits": task.bits,
        "group_size": task.group_size,
        "sym": task.symmetric,
        "offload_to_disk": False,
        # The other layout stores every zero less one, which its modules do not undo in memory: the
        # weights would be off by one step of the grid.
        "format": "gptq_v2",
    }
    return QuantizeConfig(**{**options, **methods[task.method], **task.settings})


def weights(model: Any) -> dict[str, Any]:
    """Layer name → dequantized [out, in] weight of every quantized linear."""
    return {
        name: module.dequantize_weight().T
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


if __name__ == "__main__":
    main()
