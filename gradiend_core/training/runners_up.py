"""The file with the weights of a training's next best evaluations."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.tensors import load_tensors, read_metadata, save_tensors
from gradiend_core.training.tables import RUNNERS_UP_FILE


def save_runners_up(path: Path, runners_up: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Write weights by their step, the best first; none is a file without tensors."""
    tensors = {f"{step}.{name}": value for step, weights in runners_up.items() for name, value in weights.items()}
    save_tensors(path, tensors, {"steps": list(runners_up)})


def load_runners_up(folder: Path | str) -> dict[int, GradiendModel]:
    """The models of the next best evaluations in the folder of a seed, by their step, the best first.

    Raises:
        GradiendError: the folder's files are missing or damaged.
    """
    path = Path(folder) / RUNNERS_UP_FILE
    steps, tensors = read_metadata(path)["steps"], load_tensors(path)
    models = {step: GradiendModel.from_pretrained(folder) for step in steps}
    for step, model in models.items():
        model.load_state_dict({name: tensors[f"{step}.{name}"] for name in model.state_dict()})
    return models
