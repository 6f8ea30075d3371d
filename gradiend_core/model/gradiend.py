"""The GRADIEND encoder-decoder and its files (semantics, section 1)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradiend_core.config.section import near_miss
from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged, read_json, write_json
from gradiend_core.gradients.selection import Selection, top_k
from gradiend_core.tensors import load_tensors, save_tensors

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"
FORMAT_VERSION: Final = 1

Quantity = Literal["factual", "alternative", "diff"]
Part = Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"]

# By the reference's names. Its encoder's `id` is a LayerNorm of one number, hence constant (BUG-11); this is x.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "smht": F.hardtanh,
    "id": lambda x: x,
}
# f(-x) = -f(x): encoders whose encodings can be negated without changing what is computed from them.
ODD_ACTIVATIONS: Final = frozenset({"tanh", "smht", "id"})

# Matrix products of BLAS count in 32-bit integers; wider layers are computed in pieces.
_WIDEST = 2**31 - 1


class GradiendModel(nn.Module):
    """h = f(W_e s/c_s + b_e) and ŷ = c_y · k(W_d h + b_d), for gradients s and y at the entries of a selection.

    c_s and c_y are the stored scales of source and target gradients (both 1 under `reference` scaling), so that
    `encode` takes and `decode` gives true gradient units. h has `latent_dim` entries. f and k are `ACTIVATIONS`, named
    in any casing. Weights are float32, whatever torch's default is.

    Attributes:
        selection: the n base-model entries that the vectors stand for.
        source, target: which gradients were encoded and decoded.
        target_classes: h is about +1 for gradients of the first class and -1 for the second.
        metadata: where the model comes from (base model, seed, …); JSON-able.

    Raises:
        GradiendError: for an unknown activation, or less than one latent.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        target_classes: tuple[str, str],
        source: Quantity = "alternative",
        target: Quantity = "diff",
        latent_dim: int = 1,
        activation_encoder: str = "tanh",
        activation_decoder: str = "id",
        bias_decoder: bool = True,
        source_scale: float = 1.0,
        target_scale: float = 1.0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.selection = selection
        self.target_classes = target_classes
        self.source: Quantity = source
        self.target: Quantity = target
        self.activation_encoder = _known("activation_encoder", activation_encoder.lower(), list(ACTIVATIONS))
        self.activation_decoder = _known("activation_decoder", activation_decoder.lower(), list(ACTIVATIONS))
        if latent_dim < 1:
            raise GradiendError(f"latent_dim: must be at least 1, not {latent_dim}")
        self.source_scale, self.target_scale = source_scale, target_scale
        self.metadata = metadata or {}
        n = selection.n
        self.encoder = _zero_linear(n, latent_dim)
        self.decoder = _zero_linear(latent_dim, n, bias=bias_decoder)

    def reset_parameters(self, seed: int, *, zero_decoder_bias: bool) -> None:
        """The reference's initialisation: W_e, b_e uniform on ±1/√n, then W_d (and b_d) uniform on ±|max(W_e)|.

        The largest weight of a few entries may be negative, where the reference fails; its size is taken.
        """
        random = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.selection.n)
        with torch.no_grad():
            self.encoder.weight.uniform_(-bound, bound, generator=random)
            self.encoder.bias.uniform_(-bound, bound, generator=random)
            largest = abs(float(self.encoder.weight.max()))
            self.decoder.weight.uniform_(-largest, largest, generator=random)
            if self.decoder.bias is not None:
                spread = 0.0 if zero_decoder_bias else largest
                self.decoder.bias.uniform_(-spread, spread, generator=random)

    def encode(self, gradients: Tensor) -> Tensor:
        """Encodings [N, latent_dim] of source gradients [N, n]."""
        scaled = gradients.float() / self.source_scale
        return ACTIVATIONS[self.activation_encoder](_wide_input(scaled, self.encoder.weight, self.encoder.bias))

    def decode(self, encodings: Tensor) -> Tensor:
        """Target gradients [N, n] that belong to encodings [N, latent_dim]."""
        decoded = _wide_output(encodings, self.decoder.weight, self.decoder.bias)
        return self.target_scale * ACTIVATIONS[self.activation_decoder](decoded)

    def forward(self, gradients: Tensor) -> Tensor:
        """Reconstructed target gradients [N, n] of source gradients [N, n]."""
        return self.decode(self.encode(gradients))

    @property
    def can_flip(self) -> bool:
        """Whether `flip` exists for the encoder's activation."""
        return self.activation_encoder in ODD_ACTIVATIONS

    def flip(self, latents: Sequence[int] | None = None) -> None:
        """Negate the encodings of some latents (all by default) and keep every reconstruction.

        Their rows of W_e and b_e and their columns of W_d change sign; b_d stays (BUG-03), and so may the decoder's
        activation be any. The encoder's must be odd: f(-x) = -f(x). For relu, leakyrelu, gelu, silu and elu f(-x) is
        no affine function of f(x), and W_d and b_d could undo no other. For sigmoid it is, f(-x) = 1 - f(x), at the
        price of another b_d; but its encodings stay positive, so that turned around or not it does not tell the
        classes apart by their signs.

        Raises:
            GradiendError: when the encoder's activation is not odd.
        """
        if not self.can_flip:
            raise GradiendError(
                f"activation_encoder {self.activation_encoder!r} is not odd: negating its encodings changes what the"
                f" model computes. Take one of {', '.join(sorted(ODD_ACTIVATIONS))} to have encodings turned around."
            )
        chosen = slice(None) if latents is None else list(latents)
        with torch.no_grad():
            for part in (self.encoder.weight, self.encoder.bias, self.decoder.weight.T):
                part[chosen] = -part[chosen]

    def strengthening_factor(self, target_class: str) -> float:
        """The feature factor φ (+1 or -1) whose decoded update makes `target_class` more likely (semantics 3).

        φ = ±1 decodes the target of rows that encode there: for diff and factual the gradient of the factual word,
        whose addition makes that word less likely; for alternative that of the alternative word.
        """
        if target_class not in self.target_classes:
            allowed = " or ".join(self.target_classes)
            raise GradiendError(f"target class {target_class!r}: this model knows {allowed}")
        direction = 1.0 if target_class == self.target_classes[0] else -1.0
        return direction if (self.source == "alternative") != (self.target == "alternative") else -direction

    def importance(self, part: Part = "decoder-weight") -> Tensor:
        """Non-negative score of each entry [n], summed over latents (semantics 1.2)."""
        _known("part", part, list(get_args(Part)))
        bias = self.encoder.weight.new_zeros(self.selection.n) if self.decoder.bias is None else self.decoder.bias
        scores: dict[Part, Tensor] = {
            "encoder-weight": self.encoder.weight.abs().sum(0),
            "decoder-weight": self.decoder.weight.abs().sum(1),
            "decoder-bias": bias.abs(),
            "decoder-sum": (self.decoder.weight.sum(1) + bias).abs(),
        }
        return scores[part].detach()

    def prune(
        self,
        topk: int | float | None = None,
        part: Part = "decoder-weight",
        *,
        threshold: float | None = None,
        mask: Tensor | None = None,
    ) -> "GradiendModel":
        """A model of the most important entries only, other weights kept; it equals this model with the rest at 0.

        Criteria apply in this order (semantics 5): `mask`, the importance reaches `threshold`, and the `topk` among
        those that remain (a count, or a fraction of them, rounded up). None leaves a criterion out.

        Args:
            part: the weights whose `importance` decides.
            threshold: in units of the weights, i.e. of gradients divided by the stored scales.
            mask: entries that may stay [n] (bool).

        Raises:
            GradiendError: when no entry is left, or `mask` is not a mask of n entries.
        """
        n, importance = self.selection.n, self.importance(part)
        candidates = torch.arange(n) if mask is None else _mask_positions(mask, n)
        left = importance[candidates.to(importance.device)]
        if threshold is not None and threshold > (largest := float(left.max())):
            raise GradiendError(
                f"threshold: no entry's {part} importance reaches {threshold:g}, the largest is {largest:g}. Lower it,"
                " or choose entries by topk alone."
            )
        coordinates = candidates[top_k(left, topk, threshold=threshold or 0.0)]
        pruned = self._like(self.selection.prune(coordinates))
        with torch.no_grad():
            pruned.encoder.weight.copy_(self.encoder.weight[:, coordinates])
            pruned.encoder.bias.copy_(self.encoder.bias)
            pruned.decoder.weight.copy_(self.decoder.weight[coordinates])
            if self.decoder.bias is not None:
                pruned.decoder.bias.copy_(self.decoder.bias[coordinates])
        return pruned

    def _like(self, selection: Selection) -> "GradiendModel":
        return GradiendModel(selection, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "target_classes": self.target_classes,
            "source": self.source,
            "target": self.target,
            "latent_dim": self.encoder.out_features,
            "activation_encoder": self.activation_encoder,
            "activation_decoder": self.activation_decoder,
            "bias_decoder": self.decoder.bias is not None,
            "source_scale": self.source_scale,
            "target_scale": self.target_scale,
            "metadata": self.metadata,
        }

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json into `folder`, which is created when missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / WEIGHTS_FILE, folder / CONFIG_FILE)

    def save(self, weights: Path, config: Path) -> None:
        """Write the two files under any names."""
        tensors, mapping = self.selection.to_tensors()
        save_tensors(weights, tensors | dict(self.state_dict()), {"format_version": FORMAT_VERSION})
        arguments = self._arguments() | {"target_classes": list(self.target_classes)}
        write_json(config, {"format_version": FORMAT_VERSION, "mapping": mapping, "gradiend": arguments})

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Load a folder written by `save_pretrained`; raises `GradiendError` when it is missing or damaged."""
        config_file, weights_file = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
        config, tensors = read_json(config_file), load_tensors(weights_file)
        try:
            version, written = config["format_version"], config["gradiend"]
            if version == FORMAT_VERSION:
                arguments = written | {"target_classes": tuple(written["target_classes"])}
                selection = Selection.from_tensors(tensors, config["mapping"])
                if tensors["encoder.weight"].shape != (arguments["latent_dim"], selection.n):  # before memory is taken
                    raise TypeError(f"{arguments['latent_dim']} latents of {selection.n} entries")
                model = cls(selection, **arguments)
                weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("kept.")}
                model.load_state_dict(weights)
                return model
        except (KeyError, TypeError, RuntimeError) as error:
            raise damaged(config_file, f"it does not fit {weights_file.name} ({error})") from None
        except GradiendError as error:
            raise GradiendError(f"{config_file}: {error}") from None
        raise damaged(config_file, f"format version {version}, not {FORMAT_VERSION}")


def _zero_linear(inputs: int, outputs: int, *, bias: bool = True) -> Any:
    """A float32 `nn.Linear` of zeros."""
    # On the meta device nothing is drawn from the global generator, nor imported, as it is by `skip_init`.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta")
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.zeros(parameter.shape, dtype=torch.float32)))
    return layer


def _known(parameter: str, value: str, allowed: list[str]) -> str:
    if value not in allowed:
        raise GradiendError(f"{parameter} {value!r} is not known{near_miss(value, allowed)}")
    return value


def _mask_positions(mask: Tensor, n: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (n,) or not mask.any():
        raise GradiendError(
            f"mask: must be a bool tensor [{n}], true for at least one entry, not {mask.dtype} {list(mask.shape)}"
            f" with {int(mask.count_nonzero())} true"
        )
    return mask.cpu().nonzero()[:, 0]


def _wide_input(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b for any number of inputs: pieces of x [N, inputs] and W [outputs, inputs] are multiplied and added."""
    if x.shape[1] <= _WIDEST:
        return F.linear(x, weight, bias)
    (first, *others), (first_weight, *weights) = torch.split(x, _WIDEST, 1), torch.split(weight, _WIDEST, 1)
    result = F.linear(first, first_weight, bias)
    for piece, piece_weight in zip(others, weights, strict=True):
        result = result + F.linear(piece, piece_weight)
    return result


def _wide_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for any number of outputs, computed piece by piece."""
    if len(weight) <= _WIDEST:
        return F.linear(x, weight, bias)
    weights = torch.split(weight, _WIDEST)
    biases = [None] * len(weights) if bias is None else torch.split(bias, _WIDEST)
    return torch.cat([F.linear(x, *piece) for piece in zip(weights, biases, strict=True)], 1)
