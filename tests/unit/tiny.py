"""Tiny language models with random weights, and gradients by the most naive method there is."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gradiend_core.gradients.objectives import Example, encode, fill
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


def causal_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of causal models: texts begin with <s>, and nothing can be masked."""
    backend = ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    backend.train_from_iterator(
        TEXTS * 3, vocab_size=400, min_frequency=2, special_tokens=specials, show_progress=False
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {f"{name}_token": token for name, token in zip(("pad", "bos", "eos", "unk"), specials, strict=True)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend._tokenizer, model_max_length=MAX_LENGTH, **names
    )


_BASIC: Final = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_BERT: Final = _BASIC | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_GROUPED: Final = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}

# What makes each kind small, without making it simpler than its big siblings: the texts are longer than the windows
# of local attention, several query heads share a key, and evaluation mode matters, for there is dropout everywhere.
MASKED: Final[Mapping[str, Mapping[str, Any]]] = {
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": MAX_LENGTH + 2},
    "xlm-roberta": _BERT | {"max_position_embeddings": MAX_LENGTH + 2},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "albert": _BERT | {"embedding_size": 8},
    "electra": _BERT | {"embedding_size": 8},
    "modernbert": _BASIC
    | {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4}
    | {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1}
    | {"cls_token_id": 2, "sep_token_id": 3},
    "deberta": _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
CAUSAL: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": MAX_LENGTH, "pad_token_id": None},
    "gpt_neox": _BASIC
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}
    | {"hidden_dropout": 0.1, "attention_dropout": 0.1, "pad_token_id": None},
    "llama": _BASIC | _GROUPED | {"pad_token_id": None},
    "qwen2": _BASIC | _GROUPED,
    "gemma2": _BASIC
    | _GROUPED
    | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    | {"dropout": 0.1, "attention_dropout": 0.1, "init_std": 0.2},
}


def build(kind: str, *, seed: int = 0, **options: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model of the kind, in evaluation mode, with no weight left at a value that hides mistakes (0 or 1).

    `options` of the kind's configuration take precedence over those of `MASKED` and `CAUSAL`.
    """
    tokenizer = causal_bpe() if kind in CAUSAL else byte_bpe() if "roberta" in kind else wordpiece()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    sizes |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes |= {"max_position_embeddings": MAX_LENGTH}
    sizes |= CAUSAL[kind] if kind in CAUSAL else MASKED[kind]
    config = AutoConfig.for_model({"deberta": "deberta-v2"}.get(kind, kind), **sizes | options)
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM if kind in CAUSAL else AutoModelForMaskedLM
    model = auto.from_config(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model, tokenizer


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


CAUSAL_TEMPLATES = [
    "Today the queen saw that the water was late, and [MASK]",
    "[MASK] said that [MASK] was tired. Then [MASK]",  # several slots
    "Today the king saw [MASK]",
    "[MASK]",  # nothing before the word but <s>
    "Then [MASK]",
]
# One token each; unequal numbers; unequal; several with the same beginning, which share their input; equal, several.
CAUSAL_FACTUAL = ["he", "she", "himself", "sop", "king"]
CAUSAL_ALTERNATIVE = ["she", "hex", "her", "soq", "zoo"]


def causal_pairs(tokenizer: PreTrainedTokenizerFast) -> tuple[list[Example], list[Example]]:
    """Five examples with their factual and with their alternative words, whose tokens are predicted one by one."""
    factual, alternative = (
        [_causal_example(tokenizer, template, word) for template, word in zip(CAUSAL_TEMPLATES, words, strict=True)]
        for words in (CAUSAL_FACTUAL, CAUSAL_ALTERNATIVE)
    )
    return factual, alternative


def _causal_example(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> Example:
    """Every token of the word is scored at the position before it; the input ends before the last of them."""
    text, spans = fill(template, word)
    encoding = tokenizer(text, return_offsets_mapping=True)
    slot_of = {
        position: slot
        for position, (start, end) in enumerate(encoding["offset_mapping"])
        for slot, (first, last) in enumerate(spans)
        if start < last and end > first
    }
    ids = encoding["input_ids"]
    return Example(
        tuple(ids[: max(slot_of)]),
        tuple(position - 1 for position in slot_of),
        tuple(ids[position] for position in slot_of),
        tuple(slot_of.values()),
    )


def everything(model: PreTrainedModel) -> Selection:
    """All entries of the backbone."""
    return Selection.everything(backbone_parameters(model))


def some(model: PreTrainedModel, share: float = 0.05, seed: int = 0) -> Selection:
    """A random share of the entries of the backbone."""
    whole = everything(model)
    order = torch.randperm(whole.n, generator=torch.Generator().manual_seed(seed))
    return whole.prune(order[: int(share * whole.n)].sort().values)


class _InDoublePrecision(TorchFunctionMode):
    """Double precision stays double, though models convert to single precision in norms and softmax on purpose."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, named = [args, dict(kwargs or {})]
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            given = tuple(torch.float64 if value is torch.float32 else value for value in args)
            named = {key: torch.float64 if value is torch.float32 else value for key, value in named.items()}
        return func(*given, **named)


def exact_rows(model: PreTrainedModel, selection: Selection, examples: Sequence[Example]) -> torch.Tensor:
    """Gradients [N, n] in double precision: no batch, no padding, no code of ours but the selection's order."""
    double = copy.deepcopy(model).double().requires_grad_(True)
    parameters = dict(double.named_parameters())
    rows = []
    for example in examples:
        with _InDoublePrecision():
            logits = double(input_ids=torch.tensor([example.input_ids])).logits[0]
        assert logits.dtype is torch.float64
        taken = logits.log_softmax(-1)[list(example.positions), list(example.labels)]
        chosen = [parameters[name] for name in selection.names]
        found = torch.autograd.grad(-taken.mean(), chosen, materialize_grads=True)
        rows.append(selection.gather(dict(zip(selection.names, found, strict=True))))
    return torch.stack(rows)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative L2 error of a row."""
    difference = torch.linalg.vector_norm(ours.double() - exact.double(), dim=-1)
    return float((difference / torch.linalg.vector_norm(exact.double(), dim=-1)).max())
