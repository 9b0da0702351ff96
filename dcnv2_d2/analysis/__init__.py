"""Instruments that show what a deformable detector samples, and the drawing of figures."""

from .sampling import SamplingRecord, record_sampling, sampling_points

__all__ = ["SamplingRecord", "record_sampling", "sampling_points"]
