"""Verdicts on what no grader can tell: votes and a judge."""
