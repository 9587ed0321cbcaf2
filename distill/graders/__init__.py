"""Graders, one a file, and the pool of processes that runs them.

A grader module has `grade(submission) -> float`, a score in [0, 1], and may have `load(argument)`, which checks its
argument. To add one: write the module, list it in `base.KINDS`, and give it a table of right and of wrong answers in
tests/distill/graders/test_controls.py.
"""
