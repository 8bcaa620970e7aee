"""A trained network of two blocks and a half-broken one: everything rounded to 2 or 3 bits."""

import copy

import pytest
import torch

from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.load.huggingface import from_module
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.models.head import Head
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.train.loop import Task
from quantforge.train.teacher import HiddenTeacher
from quantforge.types import QuantSpec

FITTING, LENGTH = 24, 32


class Case:
    """A network, its rounded copy, and what training needs of both."""

    def __init__(self, trained, bits=2):
        self.float = from_module(trained)
        self.model = from_module(copy.deepcopy(trained))
        self.tokens = markov_tokens(FITTING, LENGTH, vocabulary=64, seed=1)
        unseen = markov_tokens(8, LENGTH, vocabulary=64, seed=2)
        self.reference = ReferenceOutputs.collect(trained, self.model.architecture, unseen)
        with torch.no_grad():
            self.hidden = trained.model(self.tokens).last_hidden_state
        self.head = Head(weight=trained.lm_head.weight.detach())
        self.weights = {}
        for index, layer in enumerate(self.model.layers):
            spec = QuantSpec(bits + (index % 5 == 4), 16, symmetric=index % 3 > 0)
            weight = self.original(layer.name)
            scale, zero = minmax_grid(weight, spec)
            self.weights[layer.name] = round_to_nearest(weight, scale, spec, zero)
        self.put(self.weights)

    def original(self, name):
        return self.float.module.get_submodule(name).weight.detach()

    @property
    def norms(self):
        return [p for p in self.model.module.parameters() if p.ndim == 1]

    @torch.no_grad()
    def restore_norms(self):
        own = (p for p in self.float.module.parameters() if p.ndim == 1)
        for norm, value in zip(self.norms, own, strict=True):
            norm.copy_(value)

    @torch.no_grad()
    def put(self, weights):
        for name, weight in weights.items():
            self.model.module.get_submodule(name).weight.copy_(weight.dequantize())

    def kl(self):
        outputs = self.reference
        return measure(
            self.model.module, self.model.architecture, outputs.windows, outputs, text=""
        ).kl

    def task(self, **changes):
        given = {
            "model": self.model, "weights": self.weights, "originals": self.original,
            "tokens": self.tokens, "measure": self.kl, "multipliers": {},
            "teacher": HiddenTeacher(hidden=self.hidden, head=self.head),
        }  # fmt: skip
        return Task(**given | changes)


@pytest.fixture(scope="session")
def trained():
    module = tiny_llama(blocks=2, hidden=32, intermediate=64, vocabulary=64)
    train(module, steps=80, vocabulary=64)
    with torch.no_grad():  # norms as a checkpoint holds them, so that only the layers are off
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.copy_(parameter.bfloat16())
    return module


@pytest.fixture
def case(trained):
    return Case(trained)
