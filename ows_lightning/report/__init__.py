"""What a run did, as pictures, tables and one HTML page, from the files in its folder alone."""

from ows_lightning.report.run import RunRecord
from ows_lightning.report.write import write_pictures, write_report

__all__ = ["RunRecord", "write_pictures", "write_report"]
