r"""Repairs that MMaDA's code needs under newer diffusers and transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from captum_dcam.adapters.common.compat import lent, plain_tables, without_arguments
from captum_dcam.adapters.common.loading import upstream
from captum_dcam.adapters.mmada.facts import INSTALL, LUMINA, ROWS_INSTALL
from captum_dcam.packages import importable


def package() -> Any:
    r"""Upstream's package ``models``, repaired.

    - diffusers 0.42 has no ``FLAX_WEIGHTS_NAME``, which upstream imports and never uses.
    - classes, see :func:`repair_classes`.

    Raises:
        ImportError: no such package, or one of another project.
    """
    (utils,) = upstream("MMaDA", INSTALL, "diffusers.utils")
    with lent(utils, FLAX_WEIGHTS_NAME="diffusion_flax_model.msgpack"):
        (found,) = upstream("MMaDA", INSTALL, "models", has=["MMadaModelLM", "MAGVITv2"])
    repair_classes(found.MMadaModelLM)
    return found


def rows_package() -> Any:
    r"""Lumina-DiMOO's package ``model``, its classes repaired as MMaDA's are.

    Raises:
        ImportError: no such package, or one of another project.
    """
    (found,) = upstream("Lumina-DiMOO", ROWS_INSTALL, "model", has=[LUMINA])
    repair_classes(getattr(found, LUMINA))
    return found


def has_rows() -> bool:
    """Whether the package ``model`` is Lumina-DiMOO's; none is imported."""
    spec = importlib.util.find_spec("model") if importable("model") else None
    places = (getattr(spec, "submodule_search_locations", None) or ()) if spec else ()
    return any((Path(place) / "modeling_xllmx_dimoo.py").is_file() for place in places)


@contextmanager
def repaired() -> Iterator[Any]:
    """MMaDA's code, or Lumina-DiMOO's where that is importable, can be imported and loads its
    checkpoints inside the context, which yields its package; see :func:`package`."""
    yield rows_package() if has_rows() else package()


def repair_classes(cls: Any) -> None:
    r"""Upstream's model class and its configuration under transformers 5.

    ``LLaDAModelLM`` never calls ``post_init``, so that loading finds no ``all_tied_weights_keys``;
    its ``tie_weights`` takes none of the arguments it is called with; ``MMadaConfig`` has lost the
    default of ``use_cache``, which the model reads at every call.
    """
    if not hasattr(cls, "all_tied_weights_keys"):
        cls.all_tied_weights_keys = {}
    if not hasattr(cls.config_class, "use_cache"):
        cls.config_class.use_cache = False
    without_arguments(cls)


def callable_model(model: nn.Module) -> AbstractContextManager[None]:
    r"""MMaDA's model can be called, with gradients too, while the context is open.

    - transformers 5: ``config.use_cache`` is missing, see :func:`repair_classes`; here it is set
      for models that were loaded without that repair.
    - any version: see :func:`~captum_dcam.adapters.common.compat.plain_tables`.
    """
    plain_tables(model)
    return lent(model.config, use_cache=False)
