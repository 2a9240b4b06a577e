"""What a model does when it is asked: safety and helpfulness."""
