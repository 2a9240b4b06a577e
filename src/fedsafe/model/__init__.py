"""The frozen language model, its LoRA adapter and the training objectives."""
