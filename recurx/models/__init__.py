"""TRM and HRM with the official parameter names, built on `recurx.recurse`."""

from recurx.models.act import HRM, TRM, Carry, RecursiveModel, build_model
from recurx.models.config import HRMConfig, ModelConfig, TRMConfig, config_class
from recurx.models.exploration import Exploration
from recurx.models.inner import Inner, problem_of_model
from recurx.models.losses import ACTLossHead, softmax_cross_entropy, stablemax_cross_entropy
from recurx.models.puzzle_embedding import PuzzleEmbedding
from recurx.models.stablemax import fused_stablemax_cross_entropy
from recurx.models.systems import VARIANTS, Variant

__all__ = [
    "HRM",
    "TRM",
    "VARIANTS",
    "ACTLossHead",
    "Carry",
    "Exploration",
    "HRMConfig",
    "Inner",
    "ModelConfig",
    "PuzzleEmbedding",
    "RecursiveModel",
    "TRMConfig",
    "Variant",
    "build_model",
    "config_class",
    "fused_stablemax_cross_entropy",
    "problem_of_model",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
]
