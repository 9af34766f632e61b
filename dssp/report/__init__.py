"""The report: reads a run folder and writes one self-contained HTML page with the derived cells drawn as SVG."""

from dssp.report.page import write_report
from dssp.report.run_folder import RunFolderError

__all__ = ["RunFolderError", "write_report"]
