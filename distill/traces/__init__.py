"""Traces: stored, collected, imported, exported, summed up."""
