"""`recurx.hybrid`, the public name of `recurx.experiments.hybrid`: language in front."""

from recurx.experiments.hybrid import *  # noqa: F403  every public name, and no other
from recurx.experiments.hybrid import __all__ as __all__
