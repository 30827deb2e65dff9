"""The lecture, reproduced: its figures and tables from runs, beside the published values.

`python -m trainer.lecture` runs what is missing and writes one page. Each `Exhibit` is a figure or
table: the commands that it needs, the published values, and a function of the results.
"""

from trainer.lecture.catalogue import EXHIBITS
from trainer.lecture.exhibit import Exhibit, Job, Results

__all__ = ["EXHIBITS", "Exhibit", "Job", "Results"]
