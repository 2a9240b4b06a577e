"""One module a command; each has `run(name, arguments)`."""
