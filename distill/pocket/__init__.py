"""The pocket teacher: a DeepSeek-V3 small enough to ship. What it answers, its chat template, its weights.

benchmarks/pocket/ holds the scripts that made it, and the worked chains that it learned.
"""
