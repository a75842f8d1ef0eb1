"""Model surgery, both ways: ``convert`` a stock model for lean fine-tuning, ``to_torch`` for export."""

from .api import convert
from .plain import to_torch
from .report import METHODS, ConversionReport, conversion_report

__all__ = ["METHODS", "ConversionReport", "conversion_report", "convert", "to_torch"]
