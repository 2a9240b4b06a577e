"""fedsafe: federated fine-tuning of large language models that stays safe."""

__version__ = "0.1.0"
