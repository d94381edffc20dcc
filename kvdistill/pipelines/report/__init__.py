"""One page from finished runs: what was compared, how it went, and how sure one can be."""

from kvdistill.pipelines.report.page import write_plots, write_report
from kvdistill.pipelines.report.reading import read_run, read_study

__all__ = ["read_run", "read_study", "write_plots", "write_report"]
