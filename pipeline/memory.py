"""What to do when a stage runs out of memory."""

from typing import Final

_LESS: Final = {
    "corpus_grammar": "a smaller max_size of the corpus",
    "corpus_text": "less text",
    "base_model_trained": "a smaller training.per_device_train_batch_size (with more gradient_accumulation_steps), or"
    " training.gradient_checkpointing: true",
    "generate_data": "a smaller corpus",
    "pre_prune": "a smaller batch_size, base_model_dtype: bfloat16 or gradient_checkpointing: true",
    "cache_gradients": "a smaller batch_size, base_model_dtype: bfloat16 or gradient_checkpointing: true; a smaller"
    " pre_prune.topk; more gradient_shards",
    "train": "a smaller pre_prune.topk, gradiend_batch_size or train_batch_size",
    "evaluate_decoder": "a smaller eval_batch_size",
    "plot": "a lower dpi",
}
# Stages that hold gradients or weights of the entries kept, whose number is all there is to lower.
_OTHERS: Final = "a smaller pre_prune.topk, or a smaller base model"


def explained(stage: str, error: BaseException) -> str:
    """One line: the stage, what its library said, and which parameters of the stage take less memory."""
    said = " ".join(str(error).split())[:200] or type(error).__name__
    less = _LESS.get(stage, _OTHERS)
    return f"{stage}: not enough memory ({said}). Give it more, or use {less}. Earlier results are as they were."
