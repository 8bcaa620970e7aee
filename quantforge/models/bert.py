"""BERT and the encoders whose blocks have its form: a norm behind each half, biases everywhere.

They have no head. What is measured of them is the mean of their last hidden states (`pooled`); the
pooler, a tanh layer on the first token's state, is no part of that and stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

from quantforge.models.architecture import ARCHITECTURES, Architecture

BERT = Architecture(
    name="bert",
    classes=("BertModel",),
    blocks="encoder.layer",
    stages=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    fused=(("attention.self.query", "attention.self.key", "attention.self.value"),),
    embedding="embeddings.word_embeddings",
    final_norm="",
    head="",
    pooler="pooler",
    folds=(("attention.self.value", 1),),
)
# The same block: positions are counted from behind the padding token's.
ROBERTA = replace(BERT, name="roberta", classes=("RobertaModel", "XLMRobertaModel"))
# No token types, no pooler.
DISTILBERT = replace(
    BERT,
    name="distilbert",
    classes=("DistilBertModel",),
    blocks="transformer.layer",
    stages=(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ("attention.out_lin",),
        ("ffn.lin1",),
        ("ffn.lin2",),
    ),
    fused=(("attention.q_lin", "attention.k_lin", "attention.v_lin"),),
    pooler="",
    folds=(("attention.v_lin", 1),),
)
# Relative positions, one table for all blocks.
MPNET = replace(
    BERT,
    name="mpnet",
    classes=("MPNetModel",),
    stages=(
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        ("attention.attn.o",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    fused=(("attention.attn.q", "attention.attn.k", "attention.attn.v"),),
    folds=(("attention.attn.v", 1),),
    tuples=True,
)

for _one in (BERT, ROBERTA, DISTILBERT, MPNET):
    ARCHITECTURES.register(_one.name)(_one)
