"""One grader a file, and the pool of processes that runs them."""
