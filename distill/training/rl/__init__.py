"""Reinforcement learning on problems that a grader can judge: no teacher, only right and wrong."""
