"""The pocket teacher: a DeepSeek-V3 small enough to ship, its weights, and the recipe that made them."""
