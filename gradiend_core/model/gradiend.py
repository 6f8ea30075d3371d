"""The GRADIEND encoder-decoder and its files (semantics, section 1)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradiend_core.errors import GradiendError
from gradiend_core.files import damaged, read_json, write_json
from gradiend_core.gradients.selection import Selection, top_k
from gradiend_core.tensors import load_tensors, save_tensors

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"
FORMAT_VERSION: Final = 1

Quantity = Literal["factual", "alternative", "diff"]
Part = Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"]

# Odd functions, so that turning the model around keeps what it computes.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "smht": F.hardtanh,
    "id": lambda x: x,
}


class GradiendModel(nn.Module):
    """h = f(W_e s/c_s + b_e) and ŷ = c_y · k(W_d h + b_d), for gradients s and y at the entries of a selection.

    c_s and c_y are the stored scales of source and target gradients (both 1 under `reference` scaling), so that
    `encode` takes and `decode` gives true gradient units. h has `latent_dim` entries.

    Attributes:
        selection: the n base-model entries that the vectors stand for.
        source, target: which gradients were encoded and decoded.
        target_classes: h is about +1 for gradients of the first class and -1 for the second.
        metadata: where the model comes from (base model, seed, …); JSON-able.
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
        self.activation_encoder, self.activation_decoder = activation_encoder, activation_decoder
        self.source_scale, self.target_scale = source_scale, target_scale
        self.metadata = metadata or {}
        n = selection.n
        self.encoder = nn.utils.skip_init(nn.Linear, n, latent_dim)  # type: ignore[no-untyped-call]
        self.decoder = nn.utils.skip_init(nn.Linear, latent_dim, n, bias=bias_decoder)  # type: ignore[no-untyped-call]
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def reset_parameters(self, seed: int, *, zero_decoder_bias: bool) -> None:
        """The reference's initialisation: W_e, b_e uniform on ±1/√n, then W_d (and b_d) uniform on ±max(W_e)."""
        random = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.selection.n)
        with torch.no_grad():
            self.encoder.weight.uniform_(-bound, bound, generator=random)
            self.encoder.bias.uniform_(-bound, bound, generator=random)
            largest = float(self.encoder.weight.max())
            self.decoder.weight.uniform_(-largest, largest, generator=random)
            if self.decoder.bias is not None:
                spread = 0.0 if zero_decoder_bias else largest
                self.decoder.bias.uniform_(-spread, spread, generator=random)

    def encode(self, gradients: Tensor) -> Tensor:
        """Encodings [N, latent_dim] of source gradients [N, n]."""
        return ACTIVATIONS[self.activation_encoder](self.encoder(gradients / self.source_scale))

    def decode(self, encodings: Tensor) -> Tensor:
        """Target gradients [N, n] that belong to encodings [N, latent_dim]."""
        return self.target_scale * ACTIVATIONS[self.activation_decoder](self.decoder(encodings))

    def forward(self, gradients: Tensor) -> Tensor:
        """Reconstructed target gradients [N, n] of source gradients [N, n]."""
        return self.decode(self.encode(gradients))

    def flip(self) -> None:
        """Negate every encoding and keep every reconstruction: W_e, b_e and W_d change sign, b_d stays (BUG-03)."""
        with torch.no_grad():
            for parameter in (self.encoder.weight, self.encoder.bias, self.decoder.weight):
                parameter.neg_()

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
        """Non-negative score of each entry [n] (semantics 1.2)."""
        bias = torch.zeros(self.selection.n) if self.decoder.bias is None else self.decoder.bias
        scores: dict[Part, Tensor] = {
            "encoder-weight": self.encoder.weight.abs().sum(0),
            "decoder-weight": self.decoder.weight.abs().sum(1),
            "decoder-bias": bias.abs(),
            "decoder-sum": (self.decoder.weight.sum(1) + bias).abs(),
        }
        return scores[part].detach()

    def prune(self, topk: int | float, part: Part = "decoder-weight") -> "GradiendModel":
        """A model of the most important entries only, other weights kept."""
        coordinates = top_k(self.importance(part), topk)
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
            if config["format_version"] != FORMAT_VERSION:
                raise damaged(config_file, f"format version {config['format_version']}, not {FORMAT_VERSION}")
            arguments = config["gradiend"] | {"target_classes": tuple(config["gradiend"]["target_classes"])}
            model = cls(Selection.from_tensors(tensors, config["mapping"]), **arguments)
            model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("kept.")})
        except (KeyError, TypeError, RuntimeError) as error:
            raise damaged(config_file, f"it does not fit {weights_file.name} ({error})") from None
        return model
