"""Scores of every hop, and the report."""
