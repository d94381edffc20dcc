"""kvdistill: distil several teachers into one student through their key/value caches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvdistill.distill.student.latent.model import LatentStudent

__version__ = "0.1.0"
__all__ = ["LatentStudent", "__version__"]


def __getattr__(name: str) -> Any:
    """``LatentStudent`` on demand: importing the package brings neither torch nor transformers."""
    if name == "LatentStudent":
        from kvdistill.distill.student.latent.model import LatentStudent

        return LatentStudent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
