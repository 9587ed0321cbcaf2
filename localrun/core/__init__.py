"""What every other room builds on: records of a generation, progress, text that is safe to print, files written safely."""
