"""Code that every worker executes: checks, the phases in order, evaluation and export."""
