"""How a run uses several GPUs: Lightning strategies, and who does which part of the work."""
