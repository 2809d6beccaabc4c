"""The memory and time model of a step: arithmetic alone, without torch."""
