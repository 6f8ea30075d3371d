"""GRADIEND as a library: the trained encoder-decoder, the gradient store, and rewriting a base model.

    from gradiend_core import GradiendModel, GradientStore, rewrite

Names are loaded on first use; importing the package does nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradiend_core.gradients.store import GradientStore
    from gradiend_core.model.gradiend import GradiendModel
    from gradiend_core.model.rewriting import rewrite

__all__ = ["GradiendModel", "GradientStore", "rewrite"]

_HOMES = {
    "GradiendModel": "gradiend_core.model.gradiend",
    "GradientStore": "gradiend_core.gradients.store",
    "rewrite": "gradiend_core.model.rewriting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradiend_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
