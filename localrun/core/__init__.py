"""What every other room builds on: records of a generation, progress, safe printing, safe writing."""
