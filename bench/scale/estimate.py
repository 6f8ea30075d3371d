"""What a study costs, from sizes of models, counts of FLOPs and measured unit costs: `python -m bench.scale.estimate`.

Prints the tables of docs/scale.md. Nothing is measured here; what was is named with the file it comes from, and what is
assumed is named in `ASSUMED`. Everything counts in bytes, FLOPs and seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradiend_core.config.evaluate_decoder import EvaluateDecoder
from gradiend_core.config.train import Train
from gradiend_core.gradients.plan import rows_per_batch


@dataclass(frozen=True)
class Shape:
    """An architecture as far as costs depend on it.

    `kv_size` is the width of keys and of values together, `gated` says that the feed-forward layer has three matrices.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv_size: int
    vocab: int
    gated: bool
    tied: bool
    extra: int  # entries of the embeddings besides the words', and of norms and biases
    weight_bytes: int  # of the format that the model is published and read in

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices, which every token is multiplied with."""
        attention = self.hidden * (2 * self.hidden + self.kv_size)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.intermediate)

    @property
    def backbone(self) -> int:
        """Entries that may take part: all but the head's."""
        return self.linear + self.vocab * self.hidden + self.extra

    @property
    def entries(self) -> int:
        """All weights that have to be loaded, the head's included if it is not tied."""
        return self.backbone + (0 if self.tied else self.vocab * self.hidden)

    @property
    def largest(self) -> int:
        """Entries of the largest tensor, the word embeddings."""
        return self.vocab * self.hidden

    def forward_flops(self, tokens: int, scored: float = 1.5) -> float:
        """FLOPs of a forward pass of one row, the head at its scored positions only; attention's products left out."""
        return 2.0 * (self.linear * tokens + self.vocab * self.hidden * scored)


def bert_extra(layers: int, hidden: int, intermediate: int, positions: int, types: int) -> int:
    """Position and type embeddings, biases and layer norms of a BERT's backbone."""
    return (positions + types + 2) * hidden + layers * (4 * hidden + intermediate + hidden + 4 * hidden)


BERT_BASE = Shape(
    "bert-base", 12, 768, 3072, 2 * 768, 30522, False, True, bert_extra(12, 768, 3072, 512, 2), weight_bytes=4
)
LLAMA_3B = Shape("Llama-3.2-3B", 28, 3072, 8192, 2 * 1024, 128256, True, True, (2 * 28 + 1) * 3072, weight_bytes=2)
LLAMA_70B = Shape("Llama-3-70B", 80, 8192, 28672, 2 * 1024, 128256, True, False, (2 * 80 + 1) * 8192, weight_bytes=2)
MODELS = (BERT_BASE, LLAMA_3B, LLAMA_70B)


@dataclass(frozen=True)
class Study:
    """How much is studied: features, seeds, rows of gradients of a feature and their tokens, what scores a rewrite."""

    features: int = 100
    seeds: int = 5
    shards: int = 1
    rows: int = 2000
    tokens: int = 32
    n_samples: int = 64
    scored: int = 500

    @property
    def jobs(self) -> int:
        """Stages: of each feature its dataset, its shards and seeds, and seven more; corpus, base model and check."""
        return self.features * (1 + self.shards + self.seeds + 7) + 3


STUDY = Study()
TRAIN = Train.model_validate({})

# Measured: bench/results/collector.md (rows at 1 % ÷ one forward and two backward passes of activations, which are
# three forwards' FLOPs; seconds of such a row), step.md (n = 10⁶), store.md (batch means of alternative, 1 thread,
# on an older CPU than the others).
ROW_FORWARDS = 1.11 * 3
BERT_ROW_SECONDS = 0.190
STEP_SECONDS_PER_ENTRY = 2.9e-3 / 1e6
MEANS_BYTES_PER_SECOND = 6.44e9

# Assumed: no GPU was there to measure. Published dense bf16 peaks and memory bandwidths; the shares are guesses.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}
BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12}
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.4, 0.5

# One forward and one full backward pass are three forwards' FLOPs.
IMPORTANCE_FORWARDS = 3.0
GPU_MEMORY = 80e9


def store_bytes(n: int, rows: int, entry_bytes: int) -> int:
    """A feature's stored gradients: two vectors of n entries a row."""
    return 2 * rows * n * entry_bytes


def gradiend_bytes(n: int) -> int:
    """A trained GRADIEND: 3n + 1 float32 weights."""
    return 4 * (3 * n + 1)


def weights_bytes(shape: Shape) -> int:
    """The base model's weights in the format it is read in."""
    return shape.entries * shape.weight_bytes


def pre_prune_bytes(shape: Shape, share: float = 1.0) -> float:
    """Memory of `pre_prune`: weights, 4 bytes for each entry looked at, three times the largest tensor."""
    return weights_bytes(shape) + 4 * share * shape.backbone + 3 * shape.largest * shape.weight_bytes


def cache_gradients_bytes(shape: Shape, n: int, study: Study, batch_size: int = 32) -> float:
    """Memory of `cache_gradients` with checkpoints: weights, eight row matrices, the inputs of all layers."""
    batch = rows_per_batch(batch_size, n)
    inputs = batch * study.tokens * shape.layers * shape.hidden * shape.weight_bytes
    return weights_bytes(shape) + 8 * 4 * batch * n + inputs


def train_bytes(n: int, study: Study) -> float:
    """Memory of `train`: its rows, at most all, twice in float32, and weights, moments and the best weights."""
    return 2 * study.rows * n * 4 + 4 * gradiend_bytes(n)


def forwards(study: Study) -> dict[str, float]:
    """Work of each stage that runs the base model, for one feature, in forward passes of one row."""
    grid = EvaluateDecoder.model_validate({})
    candidates = 1 + len(grid.lrs) * len(grid.feature_factors)
    return {
        "pre_prune": study.n_samples * IMPORTANCE_FORWARDS,
        "cache_gradients": study.rows * ROW_FORWARDS,
        "evaluate_decoder": float(study.scored * candidates),
    }


def gpu_hours(shape: Shape, study: Study, gpu: str) -> float:
    """All features' stages that run the base model, while the GPUs compute one after another."""
    flops = study.features * sum(forwards(study).values()) * shape.forward_flops(study.tokens)
    return flops / (PEAK_FLOPS[gpu] * SHARE_OF_PEAK) / 3600


def train_step_bytes(n: int) -> int:
    """Read and written in a training step: the rows of both batches; weights and two moments, read and written."""
    return 2 * TRAIN.train_batch_size * n * 4 + 6 * gradiend_bytes(n)


def train_gpu_hours(n: int, study: Study, gpu: str) -> float:
    """All trainings: what they move, at an assumed share of the bandwidth."""
    moved = study.features * study.seeds * TRAIN.max_steps * train_step_bytes(n)
    return moved / (BANDWIDTH[gpu] * SHARE_OF_BANDWIDTH) / 3600


def train_cpu_hours(n: int, study: Study) -> float:
    """All trainings on one thread, from measured times of the step and of reading its batches."""
    means = 2 * TRAIN.train_batch_size * n * 4 / MEANS_BYTES_PER_SECOND
    return study.features * study.seeds * TRAIN.max_steps * (means + STEP_SECONDS_PER_ENTRY * n) / 3600


def bert_cpu_hours(study: Study) -> dict[str, float]:
    """bert-base on one thread: its measured row, and the other stages by their forwards, which a row has 3.75 of."""
    second = BERT_ROW_SECONDS / ROW_FORWARDS * study.features / 3600
    return {stage: work * second for stage, work in forwards(study).items()}


def gpus_for(memory: float) -> int:
    """GPUs of 80 GB, of which 60 % may be weights as `place_model` has it, or all of them when they are spread."""
    return 1 if memory <= GPU_MEMORY else -int(-memory // (GPU_MEMORY * 0.9))


def kept(shape: Shape) -> dict[str, int]:
    """The numbers of entries that the tables are for."""
    return {"1 %": -(-shape.backbone // 100), "10⁶": 10**6, "10⁷": 10**7}


def tables(study: Study = STUDY) -> str:
    """All tables of docs/scale.md."""
    return "\n\n".join([_jobs(study), _bytes(study), _memory(study), _hours(study)])


def _jobs(study: Study) -> str:
    rows = [
        [str(shards), f"{Study(study.features, study.seeds, shards).jobs:,}"]
        + [f"{Study(runs, study.seeds, shards).jobs:,}" for runs in (10, 667)]
        for shards in (1, 2, 8)
    ]
    return _table(["Shards", f"{study.features} features", "10 features", "667 features"], rows)


def _bytes(study: Study) -> str:
    rows = []
    for shape in MODELS:
        for label, n in kept(shape).items():
            stores = [study.features * store_bytes(n, study.rows, size) for size in (4, 2)]
            models = study.features * (study.seeds + 1) * gradiend_bytes(n)
            rewritten = study.features * 2 * weights_bytes(shape)
            rows.append([shape.name, f"{label} ({n:,})", *map(_size, [stores[0] / study.features, *stores, models])])
            rows[-1] += [_size(rewritten) if label == "1 %" else ""]
    head = [
        "Model",
        "Entries kept",
        "Gradients, a feature",
        "all, float32",
        "all, bfloat16",
        "GRADIENDs",
        "Rewritten models",
    ]
    return _table(head, rows)


def _memory(study: Study) -> str:
    rows = []
    for shape in MODELS:
        for label, n in kept(shape).items():
            prune = pre_prune_bytes(shape)
            gradients = cache_gradients_bytes(shape, n, study)
            cells = [_size(weights_bytes(shape)), _size(prune), str(gpus_for(prune)), _size(gradients)]
            rows.append([shape.name, label, *cells, str(gpus_for(gradients)), _size(train_bytes(n, study))])
    head = ["Model", "Entries kept", "Weights", "pre_prune", "GPUs", "cache_gradients", "GPUs", "train"]
    return _table(head, rows)


def _hours(study: Study) -> str:
    rows = []
    for shape in MODELS:
        flops = study.features * sum(forwards(study).values()) * shape.forward_flops(study.tokens)
        cells = [f"{flops:.1e}", *(_hour(gpu_hours(shape, study, gpu)) for gpu in PEAK_FLOPS)]
        rows.append([f"{shape.name}: stages that run the base model", *cells, ""])
    rows[0][-1] = _hour(sum(bert_cpu_hours(study).values()))
    for label, n in {"1.09 · 10⁶": kept(BERT_BASE)["1 %"], "10⁷": 10**7}.items():
        hours = [_hour(train_gpu_hours(n, study, gpu)) for gpu in BANDWIDTH]
        rows.append([f"train, n = {label}", "", *hours, _hour(train_cpu_hours(n, study))])
    return _table(["All features", "FLOPs", "A100 hours", "H100 hours", "CPU hours, one thread"], rows)


def _size(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value / 1e3:.3g} kB"


def _hour(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(tables())
