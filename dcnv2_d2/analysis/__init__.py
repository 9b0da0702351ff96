"""Instruments that show what a node of a detector sees, and the drawing of figures."""

from .dilation import DilationTable, effective_dilation
from .locations import Locations, effective_locations
from .nodes import BackboneNode, RoINode
from .receptive_field import effective_receptive_field
from .saliency import SaliencyRegion, saliency_region
from .sampling import SamplingRecord, record_sampling, sampling_points
from .support import Support, choose_nodes, find_support

__all__ = [
    "BackboneNode",
    "DilationTable",
    "Locations",
    "RoINode",
    "SaliencyRegion",
    "SamplingRecord",
    "Support",
    "choose_nodes",
    "effective_dilation",
    "effective_locations",
    "effective_receptive_field",
    "find_support",
    "record_sampling",
    "saliency_region",
    "sampling_points",
]
