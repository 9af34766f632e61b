"""The report: reads a run folder and writes one self-contained HTML page with the derived cells drawn as SVG."""

from dssp.report.page import write_report
from dssp.report.run_folder import UnreadableRun

__all__ = ["UnreadableRun", "write_report"]
