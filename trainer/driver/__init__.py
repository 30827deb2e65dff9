"""One run as its driver sees it: from the first worker to the last file."""

from trainer.driver.run import drive, resume

__all__ = ["drive", "resume"]
