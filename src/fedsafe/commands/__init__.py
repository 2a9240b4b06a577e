"""One module a command, each with `run(name, arguments)`; `noise` and `parsing` serve them all."""
