"""Traces -> a trained student."""
