"""kvdistill: distil several teachers into one student through their key/value caches."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``LatentStudent`` on demand: importing the package brings neither torch nor transformers."""
    if name == "LatentStudent":
        from kvdistill.distill.latent.student import LatentStudent

        return LatentStudent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
