"""What a file kept of its checkpoint: divergence, answers, proofs."""
