"""Distributed QLoRA fine-tuning: a frozen NF4 base, LoRA adapters, one YAML file, any number of workers."""

__version__ = "0.1.0"
