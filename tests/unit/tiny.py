"""Tiny masked language models with random weights, and gradients by the most naive method there is."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from gradiend_core.gradients.objectives import Example, encode
from gradiend_core.gradients.selection import Selection, backbone_parameters

MAX_LENGTH = 24

TEXTS = [
    "He said that he was late.",
    "She said that she was late.",
    "Then he said that the doctor was tired.",
    "Then she knew that the nurse was tired.",
    "Today the king saw himself in the water.",
    "Today the queen saw herself in the water.",
    "he (he) went home, and she (she) slept.",
]
WORDS = ["he", "she", "him", "her", "##self", "said", "that", "was", "late", "then", "the", "doctor", "nurse", "tired"]
WORDS += ["knew", "today", "king", "queen", "saw", "in", "water", "went", "home", "and", "slept", ".", ",", "(", ")"]


def wordpiece(*, lowercase: bool = True, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer in the manner of BERT; `extra` entries are added to its vocabulary."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *extra])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, model_max_length=MAX_LENGTH, **names
    )


def byte_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of RoBERTa: a word after a space is another token than without."""
    backend = ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        TEXTS * 3, vocab_size=400, min_frequency=2, special_tokens=specials, show_progress=False
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend._tokenizer,
        model_max_length=MAX_LENGTH,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def build(kind: str, *, seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model of the kind, in evaluation mode, with no weight left at a value that hides mistakes (0 or 1)."""
    tokenizer = byte_bpe() if kind == "roberta" else wordpiece()
    torch.manual_seed(seed)
    model = _model(kind, tokenizer).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model, tokenizer


def _model(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    bert = sizes | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    bert |= {"max_position_embeddings": MAX_LENGTH}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**bert))
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**bert | {"max_position_embeddings": MAX_LENGTH + 2}))
    if kind == "albert":
        return AlbertForMaskedLM(AlbertConfig(**bert, embedding_size=8))
    if kind == "electra":
        return ElectraForMaskedLM(ElectraConfig(**bert, embedding_size=8))
    if kind == "deberta":
        relative: dict[str, Any] = {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        }
        return DebertaV2ForMaskedLM(DebertaV2Config(**bert, **relative))
    small: dict[str, Any] = {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": MAX_LENGTH,
    }
    return DistilBertForMaskedLM(DistilBertConfig(**sizes, **small))


TEMPLATES = [
    "then [MASK] said that the doctor was late .",
    "[MASK] said that [MASK] was tired .",
    "today the king saw [MASK]",
    "the nurse knew that ( [MASK] ) went home , and slept in the water .",
    "[MASK] slept",
]
FACTUAL = ["he", "she", "himself", "she", "herself"]  # pairs of equal and of unequal numbers of tokens
ALTERNATIVE = ["she", "he", "herself", "himself", "he"]


def pairs(tokenizer: PreTrainedTokenizerFast) -> tuple[list[Example], list[Example]]:
    """Five examples with their factual and with their alternative words."""
    factual = encode(tokenizer, TEMPLATES, FACTUAL, max_length=MAX_LENGTH)
    return factual, encode(tokenizer, TEMPLATES, ALTERNATIVE, max_length=MAX_LENGTH)


def everything(model: PreTrainedModel) -> Selection:
    """All entries of the backbone."""
    return Selection.everything(backbone_parameters(model))


def some(model: PreTrainedModel, share: float = 0.05, seed: int = 0) -> Selection:
    """A random share of the entries of the backbone."""
    whole = everything(model)
    order = torch.randperm(whole.n, generator=torch.Generator().manual_seed(seed))
    return whole.prune(order[: int(share * whole.n)].sort().values)


def exact_rows(model: PreTrainedModel, selection: Selection, examples: Sequence[Example]) -> torch.Tensor:
    """Gradients [N, n] in double precision: no batch, no padding, no code of ours but the selection's order."""
    double = copy.deepcopy(model).double().requires_grad_(True)
    parameters = dict(double.named_parameters())
    rows = []
    for example in examples:
        logits = double(input_ids=torch.tensor([example.input_ids])).logits[0]
        taken = logits.log_softmax(-1)[list(example.positions), list(example.labels)]
        chosen = [parameters[name] for name in selection.names]
        found = torch.autograd.grad(-taken.mean(), chosen, materialize_grads=True)
        rows.append(selection.gather(dict(zip(selection.names, found, strict=True))))
    return torch.stack(rows)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative L2 error of a row."""
    difference = torch.linalg.vector_norm(ours.double() - exact.double(), dim=-1)
    return float((difference / torch.linalg.vector_norm(exact.double(), dim=-1)).max())
