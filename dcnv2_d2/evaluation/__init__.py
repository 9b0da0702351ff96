"""Evaluators that Detectron2 lacks."""

from .pascal_voc import PascalVOCEvaluator

__all__ = ["PascalVOCEvaluator"]
