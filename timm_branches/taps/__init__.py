"""Where a backbone is tapped and how it is read there."""

from timm_branches.taps.notation import StageInfo, Tap, TapTable, list_taps, stage_table
from timm_branches.taps.reader import TapInfo, TapReader

__all__ = ["StageInfo", "Tap", "TapInfo", "TapReader", "TapTable", "list_taps", "stage_table"]
