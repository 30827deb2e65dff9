"""The driver of a run: starts workers, stores their reports, writes the results."""

from trainer.driver.run import drive, resume

__all__ = ["drive", "resume"]
