"""Contract suites for your own extensions: functions that check a class of yours."""
