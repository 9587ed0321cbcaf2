"""Rounds in which the student answers and the teacher corrects it."""
